"""torch's Muon for matrices that FSDP2 has cut into rows: each process orthogonalises its share of whole matrices.

torch's own multiplies the shards, with 11 to 16 collectives per matrix. Here two carry all matrices there and back, and
as Newton-Schulz sees whole matrices, its result does not depend on the number of processes.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Muon
from torch.optim._muon import _adjust_lr, _zeropower_via_newtonschulz

from openlm_pipeline.experiments.optimizers.muon import newton_schulz_flops
from openlm_pipeline.models.init import shares


def on_whole_matrices(
    function: Callable[[Tensor], Tensor], shards: list[Tensor], shapes: Sequence[torch.Size], group: dist.ProcessGroup
) -> list[Tensor]:
    """This process's rows of `function(matrix)` for each matrix, called on one process each.

    Args:
        shards: its rows of each, as `torch.chunk` cuts them, all of one type.
        shapes: of the whole matrices.
    """
    size, me = group.size(), group.rank()
    largest_first = sorted(range(len(shapes)), key=lambda m: -newton_schulz_flops(shapes[m]))
    takers = shares([newton_schulz_flops(shapes[m]) for m in largest_first], size)
    dealt = [[m for m, taker in zip(largest_first, takers) if taker == rank] for rank in range(size)]
    order = [m for ms in dealt for m in ms]

    def numel(m: int, rank: int) -> int:
        each = -(-shapes[m][0] // size)
        return max(0, min(each, shapes[m][0] - rank * each)) * shapes[m][1]

    parts = [[numel(m, rank) for m in dealt[me]] for rank in range(size)]
    sent, received = [sum(shards[m].numel() for m in ms) for ms in dealt], [sum(part) for part in parts]

    def exchange(pieces: list[Tensor], sent: list[int], received: list[int]) -> Tensor:
        got = shards[0].new_empty(sum(received))
        dist.all_to_all_single(got, torch.cat([got[:0], *pieces]), received, sent, group=group)
        return got

    got = exchange([shards[m].flatten() for m in order], sent, received).split([n for part in parts for n in part])
    wholes = [torch.cat(got[i :: len(dealt[me])]).view(shapes[m]) for i, m in enumerate(dealt[me])]
    results = [function(w).flatten().split([part[i] for part in parts]) for i, w in enumerate(wholes)]
    got = exchange([result[r] for r in range(size) for result in results], received, sent)
    back = dict(zip(order, got.split([shards[m].numel() for m in order])))
    return [back[m].view_as(shard) for m, shard in enumerate(shards)]


class ShardedMuon(Muon):
    """torch's Muon with Nesterov momentum, and its state; matrices are DTensors of one mesh, cut into rows."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            params, gradients, momenta, updates = [], [], [], []
            self._init_group(group, params, gradients, momenta)
            for gradient, momentum in zip(gradients, momenta):
                gradient, momentum = gradient.to_local(), momentum.to_local()
                momentum.lerp_(gradient, 1 - group["momentum"])
                updates.append(gradient.lerp(momentum, group["momentum"]).bfloat16())
            shapes, ranks = [p.shape for p in params], _sharing(params[0])
            how = {"ns_coefficients": group["ns_coefficients"], "ns_steps": group["ns_steps"], "eps": group["eps"]}
            updates = on_whole_matrices(partial(_zeropower_via_newtonschulz, **how), updates, shapes, ranks)
            for p, update in zip(params, updates):
                weights = p.to_local()
                weights.mul_(1 - group["lr"] * group["weight_decay"])
                weights.add_(update, alpha=-_adjust_lr(group["lr"], group["adjust_lr_fn"], p.shape))


def _sharing(matrix: DTensor) -> dist.ProcessGroup:
    """The processes that have its rows between them."""
    (axis,) = (i for i, placement in enumerate(matrix.placements) if placement.is_shard())
    return matrix.device_mesh.get_group(axis)
