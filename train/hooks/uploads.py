"""Copies of a run's checkpoints and records in a store: `execution.upload_to`."""

from collections.abc import Collection
from typing import TYPE_CHECKING

from openlm_pipeline.checkpoints.folders import Checkpoint
from openlm_pipeline.runs.upload import Uploads
from openlm_pipeline.storage.remote import join
from train.hooks import HOOKS, Hook

if TYPE_CHECKING:
    from train.loop import Trainer


@HOOKS.register("uploads")
class CheckpointUploads(Hook):
    """Copies finished checkpoints and records to a URL beside training, and fetches them where there are none."""

    def __init__(self, trainer: "Trainer") -> None:
        super().__init__(trainer)
        experiment, self.uploads = trainer.experiment, None
        if experiment.execution.upload_to and trainer.world.rank == 0:
            url = join(experiment.execution.upload_to, f"{experiment.name}/{experiment.version}")
            keep = experiment.execution.keep_checkpoints
            self.uploads = Uploads(trainer.run, url, keep=keep, warn=lambda m: print(f"warning: {m}", flush=True))

    def at_start(self, until: int) -> None:
        if self.trainer.experiment.execution.upload_to:
            self.trainer.world.from_rank0(lambda: self.uploads.start(self.trainer.experiment.steps(until)))

    def at_checkpoint(self, checkpoint: Checkpoint) -> None:
        if self.uploads:
            self.uploads.add(checkpoint)

    def holds(self) -> Collection[int]:
        return self.uploads.steps if self.uploads else ()

    def at_outcome(self) -> None:
        if self.uploads:
            self.uploads.finish()
