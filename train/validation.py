"""Loss on held-out samples, in nats a token; the same at any world size up to the order of summation."""

import numpy as np
import torch

from openlm_pipeline.models.transformer import IGNORE_INDEX, Transformer
from openlm_pipeline.shards.dataset import ShardedDataset
from train.distributed import World


@torch.no_grad()
def validation_loss(
    model: Transformer, dataset: ShardedDataset, max_samples: int, batch_size: int, world: World
) -> float:
    """Mean cross-entropy over the first `max_samples` samples, split over the ranks.

    Every rank makes the same number of forward passes, as sharded models need; a rank that has run out of samples
    passes one without targets.
    """
    count = min(max_samples, len(dataset))
    sums = torch.zeros(2, device=world.device, dtype=torch.float64)
    for start in range(0, count, batch_size * world.size):
        mine = range(start + world.rank, min(start + batch_size * world.size, count), world.size)
        samples = np.stack([dataset[i] for i in mine] or [dataset[0]]).astype(np.int64)
        batch = torch.from_numpy(samples).to(world.device)
        targets = batch[:, 1:] if mine else torch.full_like(batch[:, 1:], IGNORE_INDEX)
        loss_sum, _ = model(batch[:, :-1], targets)
        sums += torch.stack([loss_sum.double(), (targets != IGNORE_INDEX).sum().double()])
    loss, tokens = world.sum(sums).tolist()
    return loss / tokens
