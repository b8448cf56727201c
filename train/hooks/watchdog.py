"""`execution.hang_seconds`."""

from contextlib import ExitStack
from typing import TYPE_CHECKING

from train.hooks import HOOKS, Hook
from train.watchdog import Watchdog

if TYPE_CHECKING:
    from train.loop import Trainer


@HOOKS.register("watchdog")
class HangWatch(Hook):
    """Ends a process whose step takes too long; what is done between steps may take its time."""

    order = 20

    def __init__(self, trainer: "Trainer") -> None:
        super().__init__(trainer)
        seconds, folder = trainer.experiment.execution.hang_seconds, trainer.run.path / "hangs"
        self.watchdog = Watchdog(seconds, folder, trainer.world.rank, self._on_hang)
        self._watching = ExitStack()

    def at_start(self, until: int) -> None:
        self._watching.enter_context(self.watchdog.watching())

    def before_step(self) -> None:
        self.watchdog.step()

    def between_steps(self) -> None:
        self.watchdog.pause()

    def at_end(self) -> None:
        self._watching.close()

    def _on_hang(self, reason: str) -> None:
        trainer = self.trainer
        if trainer.world.rank == 0:
            trainer.run.write_outcome("failed", trainer.step, trainer.tokens, reason=reason)
