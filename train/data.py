"""Batches: step s takes samples s*B .. (s+1)*B of the run's order, split over ranks in rank order.

So a batch depends on the step alone, whatever the world size, and the state of the loader is the step. Any number of
shards serves any number of processes. Batches are read by a thread ahead of their use, and shards that are not on this
machine are asked for earlier still.
"""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from openlm_pipeline.errors import ConfigError
from openlm_pipeline.experiments import Experiment
from openlm_pipeline.fingerprint import Tree
from openlm_pipeline.ordering import order_of
from openlm_pipeline.runs.layout import layout
from openlm_pipeline.shards.dataset import ShardedDataset

_SHARDS_AHEAD_STEPS = 16
"""Steps between asking for the shards of a batch and reading it."""

Picks = tuple[np.ndarray, np.ndarray]
"""(source, sample in the source) of each sequence of a batch."""


def check_ids(dataset: ShardedDataset, rows: int) -> None:
    """
    Raises:
        ConfigError: its tokenizer may give an id for which an embedding of `rows` rows has none.
    """
    tokenizer = dataset.info["tokenizer"]
    largest = tokenizer.get("largest_id", tokenizer["vocab_size"] - 1)
    if largest >= rows:
        raise ConfigError(
            f"{dataset.folder} may hold the id {largest}, and the model's embedding has {rows} rows: set "
            f"model.vocab_size to {largest + 1} or more, or tokenize with the model's own tokenizer"
        )


class Batches:
    """This rank's part of each global batch."""

    def __init__(
        self,
        experiment: Experiment,
        datasets: list[ShardedDataset],
        rank: int,
        world_size: int,
        identity: Tree | None = None,
    ) -> None:
        """
        Args:
            identity: of the run, see `order_of`.

        Raises:
            ConfigError: the global batch does not divide over the ranks, or a dataset's vocabulary is larger than the
                model's.
        """
        laid = layout(experiment, world_size)
        self.global_sequences, self.local_sequences = laid.sequences, laid.local_sequences
        self.micro_batch = laid.micro_batch
        for d in datasets:
            check_ids(d, experiment.model_config_resolved().vocab_size)
        self.datasets = datasets
        self.order = order_of(experiment, [d.shard_sizes for d in datasets], identity)
        self.sample_tokens = experiment.seq_len + 1
        self.prefetch_batches = experiment.execution.prefetch_batches
        self.first = rank * self.local_sequences

    def load(self, step: int) -> torch.Tensor:
        """This rank's samples of a step: int64[local_sequences, seq_len + 1], in pinned memory where there is a GPU."""
        return self._read(self._picks(step))

    def from_step(self, step: int) -> Iterator[torch.Tensor]:
        """Samples of `step`, `step + 1`, ..., the next ones read while these are used.

        What goes wrong in reading is raised here. Closing the iterator drops what was read ahead and ends its thread,
        without waiting for a read under way.
        """
        waiting: deque[Picks] = deque()  # batches whose shards have been asked for, the next one first

        def read_next() -> torch.Tensor:  # runs in the one thread of the pool, so in order
            nonlocal step
            while len(waiting) <= _SHARDS_AHEAD_STEPS:
                waiting.append(self._picks(step))
                step += 1
            for dataset, _, samples in self._by_dataset(tuple(map(np.concatenate, zip(*waiting)))):
                dataset.prefetch(samples)
            return self._read(waiting.popleft())

        # A new thread is on device 0, and pinning memory there would make a context on another rank's GPU.
        device = (torch.cuda.set_device, (torch.cuda.current_device(),)) if torch.cuda.is_available() else (None, ())
        pool = ThreadPoolExecutor(1, thread_name_prefix="data", initializer=device[0], initargs=device[1])
        try:
            ready = deque(pool.submit(read_next) for _ in range(self.prefetch_batches))
            while True:
                batch = ready.popleft().result()
                ready.append(pool.submit(read_next))
                yield batch
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _picks(self, step: int) -> Picks:
        return self.order.picks(step * self.global_sequences + self.first, self.local_sequences)

    def _by_dataset(self, picks: Picks) -> Iterator[tuple[ShardedDataset, np.ndarray, np.ndarray]]:
        """(dataset, rows of the batch, their samples in the dataset) of each dataset in a batch."""
        source, sample = picks
        for s in np.unique(source):
            rows = np.flatnonzero(source == s)
            yield self.datasets[s], rows, sample[rows]

    def _read(self, picks: Picks) -> torch.Tensor:
        shape = (self.local_sequences, self.sample_tokens)
        batch = torch.empty(shape, dtype=torch.int64, pin_memory=torch.cuda.is_available())
        for dataset, rows, samples in self._by_dataset(picks):
            batch.numpy()[rows] = dataset.gather(samples)
        return batch
