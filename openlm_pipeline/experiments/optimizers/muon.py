"""Muon (https://kellerjordan.github.io/posts/muon/) with AdamW for what is no matrix of a block."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

from openlm_pipeline.experiments.optimizers import Named
from openlm_pipeline.experiments.optimizers.adamw import FusedAdamW
from openlm_pipeline.registry import OPTIMIZERS

if TYPE_CHECKING:
    from torch.optim import Optimizer

_NEWTON_SCHULZ_STEPS = 5
"""torch's default."""


@OPTIMIZERS.register("muon")
class MuonWithAdamW(FusedAdamW):
    """Orthogonalised momentum for the matrices inside the blocks, AdamW for the rest.

    A matrix is taken whole, fused ones too, at a rate scaled so that AdamW's `lr` and `weight_decay` suit it
    (https://arxiv.org/abs/2502.16982).
    """

    def build(self, named_parameters: Named) -> "list[Optimizer]":
        from torch.optim import Muon

        def is_matrix(name: str, ndim: int) -> bool:
            return name.startswith("layers.") and ndim == 2

        t = self.training
        matrices = [p for name, p in named_parameters if is_matrix(name, p.ndim)]
        parts = super().build([(name, p) for name, p in named_parameters if not is_matrix(name, p.ndim)])
        if matrices:
            parts.append(
                Muon(
                    matrices,
                    lr=t.lr,
                    weight_decay=t.weight_decay,
                    ns_steps=_NEWTON_SCHULZ_STEPS,
                    adjust_lr_fn="match_rms_adamw",
                )
            )
        return parts

    def state_values(self) -> tuple[float, float]:
        return (1, 2)

    def flops_per_step(self, matrices: Iterable[tuple[int, int]]) -> int:
        """Newton-Schulz: per iteration X Xᵀ, its square, and its product with X, of the matrix with fewer rows."""
        total = 0
        for shape in matrices:
            small, large = sorted(shape)
            total += _NEWTON_SCHULZ_STEPS * (4 * small**2 * large + 2 * small**3)
        return total
