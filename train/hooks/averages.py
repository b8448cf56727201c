"""Running averages of the weights, kept in fp32 beside them and sharded as they are.

They depend on the step alone beside the weights, so a checkpoint holds the averages and no counters.
"""

from collections.abc import Collection, Iterable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from openlm_pipeline.experiments.spec import parse_average
from openlm_pipeline.models.init import parameter_name
from train.hooks import HOOKS, Hook, State, Step

if TYPE_CHECKING:
    from train.loop import Trainer


class Averages:
    """The averages that a recipe names, beginning at the weights `model` has now."""

    def __init__(self, specs: Iterable[str], model: nn.Module) -> None:
        self.model = model
        self.rules = {spec: parse_average(spec) for spec in specs}
        self.state: dict[str, dict[str, Tensor]] = {}
        """Name of the average -> name of the parameter -> its average; loading a checkpoint fills these in place."""
        self.restart(self.rules)

    def restart(self, specs: Iterable[str]) -> None:
        """Begin these averages at the weights that the model has now."""
        for spec in specs:
            self.state[spec] = {name: p.detach().float().clone() for name, p in _sharded_parameters(self.model)}

    @torch.no_grad()
    def update(self, steps_done: int) -> None:
        """Take in the weights after `steps_done` steps, where an average is due.

        The k-th update moves an average towards the weights by 1 - GAMMA (ema), or by (ETA + 1) / (ETA + k) (poly,
        equation 10 of https://arxiv.org/abs/1212.1824).
        """
        for spec, (method, parameter, every) in self.rules.items():
            if steps_done % every == 0:
                weight = 1 - parameter if method == "ema" else (parameter + 1) / (parameter + steps_done // every)
                averages = [_local(a) for a in self.state[spec].values()]
                weights = [_local(p).to(a.dtype) for a, (_, p) in zip(averages, _sharded_parameters(self.model))]
                torch._foreach_lerp_(averages, weights, weight)


def _sharded_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Parameters by their own names; what a forward pass gathered is given back before, as it would be stale."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    for name, parameter in model.named_parameters():
        yield parameter_name(name), parameter


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@HOOKS.register("averages")
class WeightAverages(Hook):
    """Running averages of the weights (`training.averages`), each a state of its own in a checkpoint."""

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
