"""`execution.profile_steps`."""

from typing import TYPE_CHECKING

from train.hooks import HOOKS, Hook
from train.profile import StepProfiler

if TYPE_CHECKING:
    from train.loop import Trainer


@HOOKS.register("profile")
class Profile(Hook):
    """A trace of some steps of rank 0."""

    order = 10

    def __init__(self, trainer: "Trainer") -> None:
        super().__init__(trainer)
        steps = trainer.experiment.execution.profile_steps
        self.profiler = StepProfiler(trainer.run.path / "profile", steps, trainer.world.rank)

    def before_step(self) -> None:
        self.profiler.at(self.trainer.step)

    def close(self) -> None:
        self.profiler.stop(self.trainer.step)
