"""Batches: step s takes samples s*B .. (s+1)*B of the run's order, split over ranks in rank order.

So a batch depends on the step alone, whatever the world size, and the state of the loader is the step.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from openlm_pipeline.errors import ConfigError
from openlm_pipeline.experiments import Dataset, Experiment
from openlm_pipeline.layout import Home
from openlm_pipeline.ordering import DataOrder
from openlm_pipeline.shards.dataset import ShardedDataset


def open_dataset(dataset: Dataset, home: Home) -> ShardedDataset:
    """The finished shards of a dataset.

    Raises:
        MissingInputError: they are not there.
        ConfigError: they were made with another sequence length.
    """
    opened = ShardedDataset(home.shards(dataset.name, dataset.version))
    if opened.info["seq_len"] != dataset.seq_len:
        raise ConfigError(f"{opened.folder} has samples of seq_len {opened.info['seq_len']}, not {dataset.seq_len}")
    return opened


class Batches:
    """This rank's part of each global batch."""

    def __init__(self, experiment: Experiment, datasets: list[ShardedDataset], rank: int, world_size: int) -> None:
        """
        Raises:
            ConfigError: the global batch does not divide over the ranks and their micro-batches, or a dataset's
                vocabulary is larger than the model's.
        """
        sequences = experiment.training.global_batch // experiment.seq_len
        if sequences % world_size:
            raise ConfigError(f"a global batch of {sequences} sequences does not divide over {world_size} processes")
        self.global_sequences, self.local_sequences = sequences, sequences // world_size
        self.micro_batch = experiment.execution.micro_batch or self.local_sequences
        if self.local_sequences % self.micro_batch:
            raise ConfigError(
                f"the {self.local_sequences} sequences of a process do not divide into micro-batches of "
                f"{self.micro_batch}"
            )
        vocab_size = experiment.model_config_resolved().vocab_size
        for d in datasets:
            if d.info["tokenizer"]["vocab_size"] > vocab_size:
                raise ConfigError(
                    f"the tokenizer of {d.folder} has {d.info['tokenizer']['vocab_size']} ids, "
                    f"more than the model's vocab_size {vocab_size}"
                )
        self.datasets = datasets
        weights = [d.source.weight for d in experiment.training_datasets()]
        self.order = DataOrder([len(d) for d in datasets], weights, experiment.seed)
        self.first = rank * self.local_sequences

    def load(self, step: int) -> torch.Tensor:
        """This rank's samples of a step: int64[local_sequences, seq_len + 1]."""
        start = step * self.global_sequences + self.first
        picks = [self.order[i] for i in range(start, start + self.local_sequences)]
        return torch.from_numpy(np.stack([self.datasets[s][i] for s, i in picks]).astype(np.int64))

    def from_step(self, step: int) -> Iterator[torch.Tensor]:
        """Samples of `step`, `step + 1`, ...; the next step's are read while this one's are used."""
        with ThreadPoolExecutor(1, thread_name_prefix="data") as pool:
            ahead = pool.submit(self.load, step)
            while True:
                batch = ahead.result()
                step += 1
                ahead = pool.submit(self.load, step)
                yield batch
