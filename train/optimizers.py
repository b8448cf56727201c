"""The recipe's optimizer as one object for the trainer and the checkpoints; its parts are torch's own."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.optim import Optimizer

from openlm_pipeline.errors import ConfigError
from openlm_pipeline.experiments.spec import Training
from openlm_pipeline.models.init import parameter_name
from openlm_pipeline.registry import OPTIMIZERS


class Optimizers:
    """Several optimizers used as one.

    Iterating gives its parts, which is what `torch.distributed.checkpoint.state_dict` wants to save and load them.
    """

    def __init__(self, parts: list[Optimizer]) -> None:
        self.parts = parts

    def __iter__(self) -> Iterator[Optimizer]:
        return iter(self.parts)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return [group for part in self.parts for group in part.param_groups]

    def step(self) -> None:
        for part in self.parts:
            part.step()

    def zero_grad(self) -> None:
        for part in self.parts:
            part.zero_grad()


def make_optimizer(training: Training, model: nn.Module) -> Optimizers:
    """The recipe's optimizer over all parameters of `model`, each in exactly one group.

    Raises:
        ConfigError: the optimizer leaves a parameter out, or takes one twice.
    """
    named = [(parameter_name(name), parameter) for name, parameter in model.named_parameters()]
    optimizers = Optimizers(OPTIMIZERS[training.optimizer](training).build(named))
    times = Counter(id(p) for group in optimizers.param_groups for p in group["params"])
    if wrong := [f"{name} {times[id(p)]} times" for name, p in named if times[id(p)] != 1]:
        raise ConfigError(
            f"the optimizer {training.optimizer!r} takes {', '.join(wrong[:3])}; its `build` has to put each parameter "
            "in exactly one group"
        )
    return optimizers
