"""`execution.report_to`."""

from typing import TYPE_CHECKING, Any

from train.hooks import HOOKS, Hook
from train.reporting import Reporter, check_report_to

if TYPE_CHECKING:
    from train.loop import Trainer


@HOOKS.register("reporters")
class Reporters(Hook):
    """Shows records in Weights & Biases and TensorBoard."""

    def __init__(self, trainer: "Trainer") -> None:
        super().__init__(trainer)
        trainer.world.from_rank0(lambda: check_report_to(trainer.experiment))
        is_first = trainer.world.rank == 0
        self.reporter = Reporter(trainer.experiment, trainer.run, trainer.warn) if is_first else None

    def at_record(self, record: dict[str, Any]) -> None:
        self.reporter.write(record)

    def close(self) -> None:
        if self.reporter:
            self.reporter.close()
