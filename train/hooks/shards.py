"""Shards of earlier releases are checked while they are trained on: those of later ones have a sum for each sample.

One process per machine hashes them, in the order in which the run reads them. Training does not wait for it, and stops
at the first that is damaged; a milestone waits until all that was read for it is checked.
"""

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from openlm_pipeline.errors import DataError
from openlm_pipeline.ordering import order_of
from openlm_pipeline.shards.checked import BackgroundCheck
from openlm_pipeline.shards.dataset import ShardedDataset
from train.hooks import HOOKS, Hook, Step

if TYPE_CHECKING:
    from train.loop import Trainer

_SAMPLES = 1 << 16
"""Of the order, looked at at a time."""


@HOOKS.register("shards")
class ShardChecks(Hook):
    """Nothing to do where all datasets have sums."""

    order = 10

    def __init__(self, trainer: "Trainer") -> None:
        super().__init__(trainer)
        self._datasets = trainer.batches.datasets
        held_out = trainer.held_out.values()
        self._unsure = any(not d.has_sums for d in [*self._datasets, *held_out])
        self._check: BackgroundCheck | None = None
        if self._unsure and int(os.environ.get("LOCAL_RANK", 0)) == 0:
            self._to_come = [np.full(len(d.shard_sizes), not d.has_sums) for d in self._datasets]
            self._held_out = [d for d in held_out if not d.has_sums]
            self._order = order_of(trainer.experiment, [d.shard_sizes for d in self._datasets], trainer.run.identity)
            self._read = trainer.step * trainer.batches.global_sequences  # a fork begins where its parent was checked
            self._check = BackgroundCheck(self._needed)

    def after_step(self, step: Step, taken: bool) -> None:
        if self._check:
            self._check.want(self.trainer.step)

    def between_steps(self) -> None:
        if self._check and self._check.problem:
            raise self._check.problem

    def at_milestone(self) -> dict[str, float]:
        if self._unsure:
            while self.trainer.world.any(bool(self._check) and not self._check.reached(self.trainer.step)):
                pass
            if self.trainer.world.any(bool(self._check) and self._check.problem is not None):
                raise (self._check and self._check.problem) or DataError("another machine found a damaged shard")
        return {}

    def close(self) -> None:
        if self._check:
            self._check.close()

    def _needed(self, step: int) -> Iterator[tuple[ShardedDataset, int]]:
        """What was read by a step and not before; the validation data first, which is read as a whole."""
        for dataset in self._held_out:
            yield from ((dataset, k) for k in range(len(dataset.entries)))
        self._held_out = []
        end = step * self.trainer.batches.global_sequences
        while self._read < end and any(shards.any() for shards in self._to_come):
            count = min(_SAMPLES, end - self._read)
            source, sample = self._order.picks(self._read, count)
            for s, to_come in enumerate(self._to_come):
                if to_come.any():
                    dataset = self._datasets[s]
                    touched = np.zeros_like(to_come)
                    touched[dataset.shards_of(sample[source == s])] = True
                    for k in np.flatnonzero(touched & to_come).tolist():
                        yield dataset, k
                    to_come &= ~touched
            self._read += count
