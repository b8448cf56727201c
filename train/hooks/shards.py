"""Shards of earlier releases are checked while they are trained on: those of later ones have a sum for each sample.

One process per machine hashes them, in the order in which the run reads them. Training does not wait for it, and stops
at the first that is damaged; a milestone waits until all that was read for it is checked.
"""

import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import TYPE_CHECKING

import numpy as np

from openlm_pipeline.errors import DataError
from openlm_pipeline.ordering import order_of
from openlm_pipeline.shards.dataset import ShardedDataset
from openlm_pipeline.storage.file_hashes import FileHashes
from openlm_pipeline.waits import waiting_for
from train.hooks import HOOKS, Hook

if TYPE_CHECKING:
    from train.loop import Trainer

_SAMPLES = 1 << 16
"""Of the order, looked at at a time."""
_POLL_SECONDS = 1.0


def check_shard(hashes: FileHashes, dataset: ShardedDataset, k: int) -> None:
    """Compare the hash of a local shard with the manifest's.

    Raises:
        DataError: it is damaged or missing.
    """
    path = dataset.file(k)
    if not path.exists() or hashes.sha256(path) != dataset.entries[k].sha256:
        dataset.check_shard(k)


@HOOKS.register("shards")
class ShardChecks(Hook):
    """Nothing to do where all datasets have sums."""

    order = 10

    def __init__(self, trainer: "Trainer") -> None:
        super().__init__(trainer)
        self._datasets = trainer.batches.datasets
        held_out = trainer.held_out.values()
        self._unsure = any(not d.has_sums for d in [*self._datasets, *held_out])
        self._pool: ThreadPoolExecutor | None = None
        self._checking: Future[None] | None = None
        self._closed = False
        if self._unsure and int(os.environ.get("LOCAL_RANK", 0)) == 0:
            self._to_come = [np.full(len(d.shard_sizes), not d.has_sums) for d in self._datasets]
            self._held_out = [d for d in held_out if not d.has_sums]
            self._order = order_of(trainer.experiment, [d.shard_sizes for d in self._datasets], trainer.run.identity)
            self._read = trainer.step * trainer.batches.global_sequences  # a fork begins where its parent was checked
            self._hashes, self._pool = FileHashes(), ThreadPoolExecutor(1, thread_name_prefix="shard-check")

    def between_steps(self) -> None:
        if self._pool and (self._checking is None or self._checking.done()):
            self._finish()
            self._checking = self._pool.submit(self._check, self.trainer.step)

    def at_milestone(self) -> dict[str, float]:
        if self._unsure:
            if self._pool:
                self._checking = self._pool.submit(self._check, self.trainer.step)
            with waiting_for("the hashes of the shards that this milestone has read"):
                while self.trainer.world.any(bool(self._checking and wait([self._checking], _POLL_SECONDS).not_done)):
                    pass
            if problem := self.trainer.world.first_error(self._finish):
                raise problem
        return {}

    def close(self) -> None:
        """End the thread once it has read the shard it is at."""
        self._closed = True
        if self._pool:
            self._pool.shutdown()

    def _finish(self) -> None:
        """
        Raises:
            DataError: the check that has ended found damage.
        """
        if self._checking:
            self._checking.result()

    def _check(self, step: int) -> None:
        """Check what is read up to a step; in a thread."""
        try:
            for dataset, k in self._needed(step):
                if self._closed:
                    return
                check_shard(self._hashes, dataset, k)
        except OSError as e:
            raise DataError(f"the shards can't be checked: {e}") from e

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
