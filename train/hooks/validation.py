"""Loss on held-out samples, in nats per token; the same at any world size up to the order of summation."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from openlm_pipeline.errors import TrainingError
from openlm_pipeline.models.transformer import IGNORE_INDEX, Transformer
from openlm_pipeline.shards.dataset import ShardedDataset
from train.distributed import World
from train.hooks import HOOKS, Hook
from train.masking import Masking

if TYPE_CHECKING:
    from train.loop import Trainer

_RESAMPLES = 10_000
"""OpenLM's `--val-iter-ci`."""


@dataclass(frozen=True)
class ValidationResult:
    """Mean loss over all tokens that were predicted."""

    loss: float
    """Nats a token."""
    tokens: int
    interval: tuple[float, float] | None
    """95% bootstrap interval of the loss, over samples."""

    def record(self) -> dict[str, float]:
        """As it stands in `metrics.jsonl` and with a milestone."""
        record = {
            "validation_loss": self.loss,
            "validation_perplexity": math.exp(min(self.loss, 700.0)),  # exp(710) is no float any more
            "validation_tokens": self.tokens,
        }
        if self.interval:
            low, high = self.interval
            record |= {"validation_loss_lower_95": low, "validation_loss_upper_95": high}
        return record


@torch.no_grad()
def validate(
    model: Transformer,
    dataset: ShardedDataset,
    masking: Masking,
    world: World,
    *,
    max_samples: int,
    batch_size: int,
    intervals: bool,
    must_stop: Callable[[], bool] = lambda: False,
) -> ValidationResult | None:
    """Loss over the first `max_samples` samples, split over the ranks, with the masks of training.

    Every rank makes the same number of forward passes, as sharded models need, each of `batch_size` samples; those that
    a rank does not have are passed without targets.

    Args:
        batch_size: samples in a forward pass of a rank; an interval needs the loss of each, so then it is 1.
        must_stop: asked before each forward pass; the same on all ranks.

    Returns:
        None where it was to stop.
    """
    count = min(max_samples, len(dataset))
    batch_size = 1 if intervals else batch_size
    # The sums of a batch stand at the number of its first sample, so where batches are single samples, at theirs.
    loss_sums = torch.zeros(count, device=world.device, dtype=torch.float64)
    token_counts = torch.zeros(count, device=world.device, dtype=torch.float64)
    for start in range(0, count, batch_size * world.size):
        if must_stop():
            return None
        mine = np.arange(start + world.rank, min(start + batch_size * world.size, count), world.size)
        # Filled up, as a compiled model would be compiled anew for another shape.
        samples = dataset.gather(np.resize(mine, batch_size)).astype(np.int64)
        batch = masking(torch.from_numpy(samples).to(world.device))
        targets = batch.targets_BS.clone()
        targets[len(mine) :] = IGNORE_INDEX
        loss_sum, _ = model(batch.ids_BS, targets, documents_BS=batch.documents_BS)
        if len(mine):
            loss_sums[mine[0]] = loss_sum
            token_counts[mine[0]] = (targets != IGNORE_INDEX).sum()
    losses, tokens = world.sum(torch.stack([loss_sums, token_counts])).cpu().numpy()
    if not tokens.sum():
        return ValidationResult(math.nan, 0, None)
    return ValidationResult(
        float(losses.sum() / tokens.sum()), int(tokens.sum()), bootstrap_interval(losses, tokens) if intervals else None
    )


def bootstrap_interval(loss_sums: np.ndarray, token_counts: np.ndarray) -> tuple[float, float]:
    """95% percentile interval of sum(loss_sums) / sum(token_counts), samples drawn anew with a fixed seed.

    Args:
        loss_sums, token_counts: of each sample; those without tokens are left out.
    """
    predicted = token_counts > 0
    if predicted.sum() < 2 or not np.isfinite(loss_sums).all():
        mean = float(loss_sums.sum() / token_counts.sum())
        return mean, mean
    from scipy import stats  # a second to import, and most runs want no interval

    result = stats.bootstrap(
        (loss_sums[predicted], token_counts[predicted]),
        lambda losses, tokens, axis: losses.sum(axis) / tokens.sum(axis),
        paired=True,
        vectorized=True,
        n_resamples=_RESAMPLES,
        batch=1000,
        method="percentile",
        rng=np.random.default_rng(0),
    )
    return float(result.confidence_interval.low), float(result.confidence_interval.high)


@HOOKS.register("validation")
class HeldOutLoss(Hook):
    """Validates at `validation.every`, between steps, and before a milestone is saved, which keeps the numbers."""

    def __init__(self, trainer: "Trainer") -> None:
        super().__init__(trainer)
        self.settings = trainer.experiment.validation
        every = self.settings.every if self.settings else None
        self.every = trainer.experiment.steps(every) if every else None

    def between_steps(self) -> None:
        if self.every and self.trainer.step % self.every == 0 and self.trainer.step < self.trainer.target:
            self._validate()

    def at_milestone(self) -> dict[str, float]:
        return self._validate() if self.settings else {}

    def _validate(self) -> dict[str, float]:
        trainer = self.trainer
        result = validate(
            trainer.model,
            trainer.held_out,
            trainer.masking,
            trainer.world,
            max_samples=self.settings.max_samples,
            batch_size=trainer.batches.micro_batch,
            intervals=self.settings.intervals,
            must_stop=lambda: trainer.world.any(trainer.stop.requested),
        )
        if result is None:  # the loop ends the run, and one that resumes validates here first
            return {}
        if not math.isfinite(result.loss):
            raise TrainingError(f"validation loss {result.loss} at step {trainer.step}: not finite; nothing was saved")
        trainer.write_record(result.record())
        interval = "" if result.interval is None else " ({:.4f} to {:.4f})".format(*result.interval)
        trainer.console.print(f"step {trainer.step:>7}  validation loss {result.loss:.4f}{interval}")
        return result.record()
