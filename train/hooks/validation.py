"""Loss on held-out samples, in nats per token and bits per byte; the same at any world size up to the order of
summation."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from openlm_pipeline.errors import OpenLMError, TrainingError
from openlm_pipeline.models.transformer import IGNORE_INDEX, Transformer
from openlm_pipeline.shards.dataset import ShardedDataset
from openlm_pipeline.tokenizers.token_bytes import bytes_of_ids
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
    text_bytes: int | None
    """That these tokens stand for; None where the tokenizer does not tell."""
    interval: tuple[float, float] | None
    """95% bootstrap interval of the loss, over samples."""

    def record(self) -> dict[str, float]:
        """As it stands in `metrics.jsonl` and with a milestone, without the `validation_` of the names."""
        record = {
            "loss": self.loss,
            "perplexity": math.exp(min(self.loss, 700.0)),  # exp(710) is no float any more
            "tokens": self.tokens,
        }
        if self.text_bytes:
            record["bits_per_byte"] = self.loss * self.tokens / math.log(2) / self.text_bytes
        if self.interval:
            record["loss_lower_95"], record["loss_upper_95"] = self.interval
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
    bytes_of_ids: torch.Tensor | None = None,
    must_stop: Callable[[], bool] = lambda: False,
) -> ValidationResult | None:
    """Loss over the first `max_samples` samples, split over the ranks, with the masks of training.

    Every rank makes the same number of forward passes, as sharded models need, each of `batch_size` samples; those that
    a rank does not have are passed without targets.

    Args:
        batch_size: samples in a forward pass of a rank; an interval needs the loss of each, so then it is 1.
        bytes_of_ids: int[vocab_size], see `tokenizers.token_bytes`.
        must_stop: asked before each forward pass; the same on all ranks.

    Returns:
        None where it was to stop.
    """
    count = min(max_samples, len(dataset))
    batch_size = 1 if intervals else batch_size
    # The sums of a batch stand at the number of its first sample, so where batches are single samples, at theirs.
    sums = torch.zeros(3, count, device=world.device, dtype=torch.float64)  # of losses, tokens and bytes
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
            predicted = targets[targets != IGNORE_INDEX]
            sums[0, mine[0]] = loss_sum
            sums[1, mine[0]] = len(predicted)
            if bytes_of_ids is not None:
                sums[2, mine[0]] = bytes_of_ids[predicted].sum()
    losses, tokens, text = world.sum(sums).cpu().numpy()
    if not tokens.sum():
        return ValidationResult(math.nan, 0, None, None)
    interval = bootstrap_interval(losses, tokens) if intervals else None
    text_bytes = None if bytes_of_ids is None else int(text.sum())
    return ValidationResult(float(losses.sum() / tokens.sum()), int(tokens.sum()), text_bytes, interval)


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
        self.bytes_of_ids = {name: self._bytes_of_ids(dataset) for name, dataset in trainer.held_out.items()}

    def between_steps(self) -> None:
        if self.every and self.trainer.step % self.every == 0 and self.trainer.step < self.trainer.target:
            self._validate()

    def at_milestone(self) -> dict[str, float]:
        return self._validate() if self.settings else {}

    def _bytes_of_ids(self, dataset: ShardedDataset) -> torch.Tensor | None:
        trainer, spec = self.trainer, self.trainer.experiment.tokenizer
        tokenizer = trainer.home.tokenizer(spec.name), dataset.info["tokenizer"]["sha256"]
        try:
            sizes = trainer.world.from_rank0(lambda: bytes_of_ids(spec, *tokenizer))
        except OpenLMError as e:
            trainer.console.print(f"validation has no bits per byte: {e}")
            return None
        of_vocabulary = torch.zeros(trainer.model.config.vocab_size, dtype=torch.int64)
        known = sizes[: len(of_vocabulary)]  # `check_ids` saw that no other is in the samples
        of_vocabulary[: len(known)] = torch.from_numpy(known)
        return of_vocabulary.to(trainer.world.device)

    def _validate(self) -> dict[str, float]:
        trainer, record = self.trainer, {}
        for i, (name, dataset) in enumerate(trainer.held_out.items()):
            result = validate(
                trainer.model,
                dataset,
                trainer.masking,
                trainer.world,
                max_samples=self.settings.max_samples,
                batch_size=trainer.batches.micro_batch,
                intervals=self.settings.intervals,
                bytes_of_ids=self.bytes_of_ids[name],
                must_stop=lambda: trainer.world.any(trainer.stop.requested),
            )
            if result is None:  # the loop ends the run, and one that resumes validates here first
                return {}
            if not math.isfinite(result.loss):
                raise TrainingError(
                    f"validation loss {result.loss} of {name} at step {trainer.step}: not finite; nothing was saved"
                )
            of_one = result.record()
            if i == 0:
                record |= {f"validation_{key}": value for key, value in of_one.items()}
            if len(trainer.held_out) > 1:
                record |= {f"validation_{key}/{name}": value for key, value in of_one.items()}
            interval = "" if result.interval is None else " ({:.4f} to {:.4f})".format(*result.interval)
            bits = f", {of_one['bits_per_byte']:.4f} bits per byte" if "bits_per_byte" in of_one else ""
            trainer.console.print(f"step {trainer.step:>7}  validation loss {result.loss:.4f}{interval}{bits}  {name}")
        trainer.write_record(record)
        return record
