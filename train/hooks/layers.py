"""Norms of gradients and weights of each layer, which show where a run that goes wrong began to."""

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from openlm_pipeline.models.init import parameter_name
from train.hooks import HOOKS, Hook, Step

if TYPE_CHECKING:
    from train.loop import Trainer


@HOOKS.register("layers")
class LayerNorms(Hook):
    """L2 norms in each record: of the last step's gradients before clipping, and of the weights that it made."""

    order = 45

    def __init__(self, trainer: "Trainer") -> None:
        super().__init__(trainer)
        named = [(_part(parameter_name(name)), p) for name, p in trainer.model.named_parameters()]
        self.parts = list(dict.fromkeys(part for part, _ in named))
        self.parameters = [p for _, p in named]
        device = trainer.world.device
        self.part_of = torch.tensor([self.parts.index(part) for part, _ in named], device=device)
        self.copies = torch.tensor([_copies(p, trainer.world.size) for p in self.parameters], device=device)
        self.every = trainer.experiment.execution.log_every
        self.gradients: Tensor | None = None

    def accepts(self, step: Step) -> bool:
        done = self.trainer.step + 1
        if done % self.every == 0 or done == self.trainer.target:
            clip = self.trainer.experiment.training.grad_clip
            clipped = 1.0 if clip is None else (clip / (step.grad_norm + 1e-6)).clamp(max=1.0)  # as torch does
            gradients = [p.grad for p in self.parameters]
            self.gradients = self._norms(gradients) / clipped
        return True

    def record(self) -> dict[str, dict[str, float | None]]:
        found = {"grad_norms": self.gradients, "weight_norms": self._norms(self.parameters)}
        return {key: self._named(norms) for key, norms in found.items() if norms is not None}

    @torch.no_grad()
    def _norms(self, tensors: list[Tensor]) -> Tensor:
        """The norm of each part, [parts], the same on all ranks."""
        local = [t.to_local() if isinstance(t, DTensor) else t for t in tensors]
        squares = torch.stack(torch._foreach_norm(local)).float().square() / self.copies
        sums = squares.new_zeros(len(self.parts)).index_add_(0, self.part_of, squares)
        return self.trainer.world.sum(sums).sqrt()

    def _named(self, norms: Tensor) -> dict[str, float | None]:
        """To four digits; None where a norm is not finite, as of a step that was left out."""
        finite = (norm if math.isfinite(norm) else None for norm in norms.tolist())
        return {part: norm and float(f"{norm:.4g}") for part, norm in zip(self.parts, finite)}


def _part(name: str) -> str:
    """`layer_07` of a parameter of that block; else the first part of its name, such as `output`."""
    first, second, *_ = name.split(".")
    return f"layer_{int(second):02d}" if first == "layers" else first


def _copies(parameter: Tensor, world_size: int) -> int:
    """How many ranks hold the same values of a parameter's shards."""
    if not isinstance(parameter, DTensor):
        return world_size
    mesh = parameter.device_mesh
    return math.prod(mesh.size(i) for i, placement in enumerate(parameter.placements) if placement.is_replicate())
