"""Batches and initial weights do not depend on the number of processes; batches are read ahead by a thread."""

import threading
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from gloo_workers import run_in_processes
from small_run import SmallRun
from waiting import wait_until

from openlm_pipeline.errors import ConfigError, DataError
from openlm_pipeline.models import create_model
from openlm_pipeline.models.init import initialize
from openlm_pipeline.shards.dataset import ShardedDataset
from openlm_pipeline.shards.opening import open_dataset
from train.data import Batches
from train.distributed import leave_process_group, start
from train.parallel import build_model


@pytest.fixture
def datasets(small: SmallRun) -> list[ShardedDataset]:
    return [open_dataset(d, small.home) for d in small.experiment().training_datasets()]


SAMPLINGS = ("permutation", "windowed", "resampled", "manifest")


@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_all_ranks_together_load_the_batch_of_one(small: SmallRun, datasets: list[ShardedDataset], world_size: int):
    experiment = small.experiment()
    whole = Batches(experiment, datasets, 0, 1)
    ranks = [Batches(experiment, datasets, rank, world_size) for rank in range(world_size)]
    for step in (0, 1, 63, 64, 1000):
        batch = torch.cat([b.load(step) for b in ranks])
        assert batch.shape == (8, 33) and batch.dtype == torch.int64
        assert torch.equal(batch, whole.load(step))


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_a_batch_holds_the_samples_of_the_order(small: SmallRun, datasets: list[ShardedDataset], sampling: str):
    batches = Batches(small.experiment(f"training.sampling={sampling}"), datasets, 0, 1)
    for step in (0, 5, 700):
        source, sample = batches.order.picks(8 * step, 8)
        expected = np.stack([datasets[s][i] for s, i in zip(source, sample)])
        assert np.array_equal(batches.load(step).numpy(), expected)


def test_each_sampling_is_an_order_of_its_own(small: SmallRun, datasets: list[ShardedDataset]):
    orders = {
        tuple(Batches(small.experiment(f"training.sampling={sampling}"), datasets, 0, 1).load(3).ravel().tolist())
        for sampling in SAMPLINGS
    }
    assert len(orders) == len(SAMPLINGS)


@pytest.mark.parametrize("prefetch_batches", [1, 2, 40])
@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_a_step_is_loaded_the_same_whatever_came_before(
    small: SmallRun, datasets: list[ShardedDataset], sampling: str, prefetch_batches: int
):
    overrides = (f"training.sampling={sampling}", f"execution.prefetch_batches={prefetch_batches}")
    batches = Batches(small.experiment(*overrides), datasets, 0, 1)
    from_start, from_five = batches.from_step(0), batches.from_step(5)
    for step in range(30):
        batch = next(from_start)
        assert torch.equal(batch, batches.load(step))
        if step >= 5:
            assert torch.equal(batch, next(from_five))
    from_start.close()
    from_five.close()


def reading_threads() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name.startswith("data")]


def test_closing_the_iterator_ends_its_thread(small: SmallRun, datasets: list[ShardedDataset]):
    before = set(reading_threads())
    batches = Batches(small.experiment(), datasets, 0, 1).from_step(0)
    next(batches)
    (thread,) = set(reading_threads()) - before
    batches.close()
    thread.join(timeout=300)
    assert not thread.is_alive()


ONE_SOURCE = ("training.sampling=manifest", 'sources=[{name: text, files: ["raw/text/*.jsonl"]}]')
"""A run that reads two shards of 151 and 150 samples one after the other, 8 a step."""


def test_a_damaged_shard_is_an_error_of_the_step_that_reads_it(small: SmallRun, datasets: list[ShardedDataset]):
    """Batches before it are still served, though the thread found out earlier."""
    batches = Batches(small.experiment(*ONE_SOURCE, "execution.prefetch_batches=8"), datasets[:1], 0, 1)
    second = int(batches.order.picks(200, 1)[1][0] >= 151)
    path = datasets[0].shard_path(second)
    path.write_bytes(path.read_bytes()[:-512])
    iterator = batches.from_step(0)
    assert len(list(islice(iterator, 18))) == 18
    with pytest.raises(DataError, match=f"shard {path} has"):
        next(iterator)


def test_remote_shards_are_fetched_before_a_batch_needs_them(
    small: SmallRun, datasets: list[ShardedDataset], tmp_path: Path
):
    remote = ShardedDataset(tmp_path / "cache", remote=datasets[0].folder.as_uri())
    assert list(remote.folder.glob("*.tar")) == []
    experiment = small.experiment(*ONE_SOURCE, "execution.prefetch_batches=1")
    iterator = Batches(experiment, [remote], 0, 1).from_step(4)
    assert torch.equal(next(iterator), Batches(experiment, datasets[:1], 0, 1).load(4))
    # Steps 4 and 5 are of the first shard, and no other is asked for; step 18 is the first to need the second.
    wait_until(lambda: len(list(remote.folder.glob("*.tar"))) == 2)
    iterator.close()


def test_a_batch_that_does_not_divide_over_the_processes_is_refused(small: SmallRun, datasets: list[ShardedDataset]):
    with pytest.raises(ConfigError, match="8 sequences does not divide over 3 processes"):
        Batches(small.experiment(), datasets, 0, 3)


def save_initial_weights(small: SmallRun, folder: Path, *overrides: str) -> None:
    """One of four processes: rank 0 keeps the weights that all have together."""
    world = start()
    experiment = small.experiment(*overrides)
    model = build_model(experiment, world)
    initialize(model, model.config, experiment.seed, threads=2)
    weights = {name: p.full_tensor() for name, p in model.named_parameters()}
    if world.rank == 0:
        torch.save(weights, folder / "weights.pt")
    leave_process_group()


@pytest.mark.parametrize("overrides", [[], ["execution.replicas=2"], ["execution.replicas=4"]])
def test_initial_weights_of_four_processes_are_those_of_one_bitwise(small: SmallRun, tmp_path: Path, overrides):
    run_in_processes(4, save_initial_weights, small, tmp_path, *overrides)
    four = torch.load(tmp_path / "weights.pt")
    experiment = small.experiment()
    one = dict(create_model(experiment.model_config_resolved(), seed=experiment.seed).named_parameters())
    assert four.keys() == one.keys()
    assert [name for name in one if not torch.equal(four[name], one[name])] == []
