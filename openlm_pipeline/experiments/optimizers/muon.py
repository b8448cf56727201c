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


def newton_schulz_flops(shape: tuple[int, int]) -> int:
    """Per iteration X Xᵀ, its square, and its product with X, of the matrix with fewer rows."""
    small, large = sorted(shape)
    return _NEWTON_SCHULZ_STEPS * (4 * small**2 * large + 2 * small**3)


@OPTIMIZERS.register("muon")
class MuonWithAdamW(FusedAdamW):
    """Orthogonalised momentum for the matrices inside the blocks, AdamW for the rest.

    A matrix is taken whole, fused ones too, on one of the processes that share it. Its rate is scaled so that AdamW's
    `lr` and `weight_decay` suit it (https://arxiv.org/abs/2502.16982).
    """

    def build(self, named_parameters: Named) -> "list[Optimizer]":
        from torch.distributed.tensor import DTensor
        from torch.optim import Muon

        from openlm_pipeline.experiments.sharded_muon import ShardedMuon

        def is_matrix(name: str, ndim: int) -> bool:
            return name.startswith("layers.") and ndim == 2

        t = self.training
        matrices = [p for name, p in named_parameters if is_matrix(name, p.ndim)]
        parts = super().build([(name, p) for name, p in named_parameters if not is_matrix(name, p.ndim)])
        if matrices:
            kind = ShardedMuon if isinstance(matrices[0], DTensor) else Muon
            parts.append(
                kind(
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
        return sum(map(newton_schulz_flops, matrices))

    def bytes_per_step(self, matrices: Iterable[tuple[int, int]], shards: int) -> int:
        """Shards of updates go to the processes that have their matrix, and come back; bf16."""
        numbers = sum(rows * columns for rows, columns in matrices)
        return 2 * 2 * numbers * (shards - 1) // shards**2
