"""Curves for people: the records of `metrics.jsonl` as scalars of Weights & Biases and of TensorBoard.

Names are OpenLM's where it has one, so that old and new runs lie on one chart; its `samples_per_second` counts tokens.
Both writers work beside training: nothing here waits for a network, and what fails is said once and then left alone.
"""

import queue
import secrets
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from openlm_pipeline.errors import ConfigError
from openlm_pipeline.experiments import Experiment
from openlm_pipeline.fingerprint import fingerprint, short
from openlm_pipeline.runs.folder import WANDB_URL, RunFolder
from openlm_pipeline.runs.machine import missing_for_reports
from openlm_pipeline.storage.files import write_text
from train.hooks import HOOKS, Hook

if TYPE_CHECKING:
    from train.loop import Trainer

Record = dict[str, Any]

_OPENLM_NAMES = {  # where they differ from `train/` and the name in the record
    "tokens_per_second": "train/samples_per_second",
    "tokens_per_second_per_gpu": "train/samples_per_second_per_gpu",
    "step_seconds": "train/batch_time",
    "data_wait_seconds": "train/data_time",
    "validation_loss_lower_95": "valid/loss_sequences_lower_95",
    "validation_loss_upper_95": "valid/loss_sequences_upper_95",
}
_CLOSE_SECONDS = 10.0


def scalars(record: Record) -> dict[str, float]:
    """A record's numbers by the names they are shown under: `train/loss`, `valid/loss`, ...

    `valid/tokens` are the tokens validated on and `valid/train_tokens` those trained on, as OpenLM has it.
    """
    shown = {}
    is_validation = "validation_loss" in record
    flat = {k: v for k, v in record.items() if not isinstance(v, dict)}
    flat |= {f"{k}/{part}": v for k, parts in record.items() if isinstance(parts, dict) for part, v in parts.items()}
    for key, value in flat.items():
        if key in ("step", "time") or value is None:
            continue
        if key in _OPENLM_NAMES:
            shown[_OPENLM_NAMES[key]] = value
        if is_validation:
            name = key.removeprefix("validation_") if key.startswith("validation_") else f"train_{key}"
            shown[f"valid/{name}"] = value
        else:
            shown[f"train/{key}"] = value
    return shown


def check_report_to(experiment: Experiment) -> None:
    """
    Raises:
        ConfigError: a package, or the key of the service, is not there. Said before anything is trained.
    """
    for missing in missing_for_reports(experiment):
        raise ConfigError(missing)


class TensorBoardWriter:
    """Event files in the run's `tensorboard/`, one per process, written by a thread of torch's writer."""

    def __init__(self, run: RunFolder) -> None:
        self.folder = run.path / "tensorboard"
        self.writer = None

    def write(self, step: int, values: dict[str, float]) -> None:
        if self.writer is None:
            from torch.utils.tensorboard import SummaryWriter

            # A run that went back to a checkpoint hides what an earlier process wrote after it.
            self.writer = SummaryWriter(str(self.folder), purge_step=step, flush_secs=10)
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()


class WandbWriter:
    """A Weights & Biases run whose id the run folder keeps, so that a restart resumes it, and another home's doesn't.

    All of wandb happens in a thread of its own: its `init` and `finish` wait for the network.
    """

    def __init__(self, experiment: Experiment, run: RunFolder, warn: Callable[[str], None]) -> None:
        self.warn = warn
        self.url_file = run.path / WANDB_URL
        self.waiting: queue.SimpleQueue[tuple[int, dict[str, float]] | None] = queue.SimpleQueue()
        if not run.wandb_file.exists():  # the first release took the id from what stands in run.json
            identity = {"name": experiment.name, "version": experiment.version, "fingerprint": run.fingerprint}
            write_text(run.wandb_file, short(fingerprint(identity)) if self.url_file.exists() else secrets.token_hex(8))
        settings = {
            "project": experiment.execution.wandb_project,
            "name": f"{experiment.name}/{experiment.version}",
            "id": run.wandb_file.read_text(),
            "resume": "allow",
            "dir": str(run.path),
            "config": experiment.model_dump(mode="json", exclude={"launcher"}),
        }
        self.thread = threading.Thread(target=self._work, args=(settings,), name="wandb", daemon=True)
        self.thread.start()

    def write(self, step: int, values: dict[str, float]) -> None:
        self.waiting.put((step, values))

    def close(self) -> None:
        self.waiting.put(None)
        self.thread.join(_CLOSE_SECONDS)
        if self.thread.is_alive():
            self.warn("wandb has not sent everything; `wandb sync` in the run's wandb/ sends the rest")

    def _work(self, settings: dict[str, Any]) -> None:
        import wandb

        try:
            # Its own console capture would take the trainer's standard output from the launcher's log.
            quiet = wandb.Settings(console="off", silent=True)
            with wandb.init(**settings, settings=quiet) as run:
                if not run.offline and run.url:
                    write_text(self.url_file, run.url)
                while item := self.waiting.get():
                    step, values = item
                    run.log(values, step=step)
        except Exception as e:  # noqa: BLE001 - whatever fails there, training continues
            self.warn(f"wandb is off for this process: {type(e).__name__}: {e}. metrics.jsonl has everything")


@HOOKS.register("reporters")
class Reporters(Hook):
    """Shows records in Weights & Biases and TensorBoard, as `execution.report_to` says; on rank 0.

    A writer takes scalars; it never raises and never waits.
    """

    def __init__(self, trainer: "Trainer") -> None:
        super().__init__(trainer)
        trainer.world.from_rank0(lambda: check_report_to(trainer.experiment))
        names = trainer.experiment.execution.report_to if trainer.world.rank == 0 else ()
        self.writers: list[TensorBoardWriter | WandbWriter] = []
        if "tensorboard" in names:
            self.writers.append(TensorBoardWriter(trainer.run))
        if "wandb" in names:
            self.writers.append(WandbWriter(trainer.experiment, trainer.run, trainer.warn))

    def at_record(self, record: Record) -> None:
        for writer in self.writers:
            writer.write(record["step"], scalars(record))

    def close(self) -> None:
        """Write what is left."""
        for writer in self.writers:
            writer.close()
