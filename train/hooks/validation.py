"""Loss on held-out text, at `validation.every` and at milestones."""

import math
from typing import TYPE_CHECKING

from openlm_pipeline.errors import TrainingError
from train.hooks import HOOKS, Hook
from train.validation import validate

if TYPE_CHECKING:
    from train.loop import Trainer


@HOOKS.register("validation")
class HeldOutLoss(Hook):
    """Validates between steps and before a milestone is saved, which keeps the numbers."""

    def __init__(self, trainer: "Trainer") -> None:
        super().__init__(trainer)
        self.settings = trainer.experiment.validation
        every = self.settings.every if self.settings else None
        self.every = trainer.experiment.steps(every) if every else None

    def between_steps(self) -> None:
        if self.every and self.trainer.step % self.every == 0 and self.trainer.step < self.trainer.target:
            self._validate()

    def at_milestone(self) -> dict[str, float]:
        return self._validate() if self.settings else {}

    def _validate(self) -> dict[str, float]:
        trainer = self.trainer
        result = validate(
            trainer.model,
            trainer.held_out,
            trainer.masking,
            trainer.world,
            max_samples=self.settings.max_samples,
            batch_size=trainer.batches.micro_batch,
            intervals=self.settings.intervals,
        )
        if not math.isfinite(result.loss):
            raise TrainingError(f"validation loss {result.loss} at step {trainer.step}: not finite; nothing was saved")
        trainer.write_record(result.record())
        interval = "" if result.interval is None else " ({:.4f} to {:.4f})".format(*result.interval)
        trainer.console.print(f"step {trainer.step:>7}  validation loss {result.loss:.4f}{interval}")
        return result.record()
