"""`training.averages`."""

from collections.abc import Collection
from typing import TYPE_CHECKING

from train.averages import Averages
from train.hooks import HOOKS, Hook, State, Step

if TYPE_CHECKING:
    from train.loop import Trainer


@HOOKS.register("averages")
class WeightAverages(Hook):
    """Running averages of the weights, each a state of its own in a checkpoint."""

    def __init__(self, trainer: "Trainer") -> None:
        super().__init__(trainer)
        self.averages = Averages(trainer.experiment.training.averages, trainer.model)

    def at_beginning(self, loaded: Collection[str]) -> None:
        self.averages.restart(spec for spec in self.averages.rules if spec not in loaded)

    def after_step(self, step: Step, taken: bool) -> None:
        if taken:
            self.averages.update(self.trainer.step)

    def state(self) -> State:
        return self.averages.state
