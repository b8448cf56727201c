"""Optimizers by name, with what they cost. One module each; torch is imported only where one is built."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from openlm_pipeline.experiments.choices import Choice

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer

EMBEDDINGS = ("tok_embeddings.weight", "output.weight")
Named = Sequence[tuple[str, "nn.Parameter"]]
"""Names, without wrappers' prefixes, and parameters."""


class OptimizerChoice(Choice, ABC):
    """Base of all optimizers; a subclass stands under `@OPTIMIZERS.register("name")`."""

    field = "optimizer"

    @abstractmethod
    def build(self, named_parameters: Named) -> "list[Optimizer]":
        """torch's optimizers, each parameter in exactly one group of one of them. The trainer sets `lr` at each step.

        Their state has to be tensors, sharded as the parameters are, or plain numbers: checkpoints hold it.
        """

    def state_values(self) -> tuple[float, float]:
        """Numbers of `training.state_precision` kept per parameter: (in the blocks, in embedding and output matrix)."""
        return (2, 2)

    def flops_per_step(self, matrices: Iterable[tuple[int, int]]) -> int:
        """Operations of one step beyond a few per parameter, over all processes.

        Args:
            matrices: [rows, columns] of each matrix inside the blocks.
        """
        return 0

    def bytes_per_step(self, matrices: Iterable[tuple[int, int]], shards: int) -> int:
        """Bytes that one process sends in one step for the optimizer itself, on average.

        Args:
            matrices: as in `flops_per_step`.
            shards: processes that have the weights between them.
        """
        return 0

    def decay_groups(self, named_parameters: Named) -> list[dict[str, Any]]:
        """Parameter groups with and without weight decay, as `training.no_decay` says; none is empty."""
        spared, decayed, undecayed = self.training.no_decay, [], []
        for name, parameter in named_parameters:
            is_spared = ("norms" in spared and parameter.ndim == 1) or ("embeddings" in spared and name in EMBEDDINGS)
            (undecayed if is_spared else decayed).append(parameter)
        groups = [(decayed, self.training.weight_decay), (undecayed, 0.0)]
        return [{"params": params, "weight_decay": decay} for params, decay in groups if params]
