"""Batches and initial weights do not depend on the number of processes."""

import multiprocessing
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from small_run import SmallRun
from torch.multiprocessing import start_processes

from openlm_pipeline.errors import ConfigError
from openlm_pipeline.models import create_model
from openlm_pipeline.shards.dataset import ShardedDataset
from train.data import Batches, open_dataset
from train.distributed import World, build_model


@pytest.fixture
def datasets(small: SmallRun) -> list[ShardedDataset]:
    return [open_dataset(d, small.home) for d in small.experiment().training_datasets()]


@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_all_ranks_together_load_the_batch_of_one(small: SmallRun, datasets: list[ShardedDataset], world_size: int):
    experiment = small.experiment()
    whole = Batches(experiment, datasets, 0, 1)
    ranks = [Batches(experiment, datasets, rank, world_size) for rank in range(world_size)]
    for step in (0, 1, 63, 64, 1000):
        batch = torch.cat([b.load(step) for b in ranks])
        assert batch.shape == (8, 33) and batch.dtype == torch.int64
        assert torch.equal(batch, whole.load(step))


def test_a_step_is_loaded_the_same_whatever_came_before(small: SmallRun, datasets: list[ShardedDataset]):
    batches = Batches(small.experiment(), datasets, 0, 1)
    from_start, from_five = batches.from_step(0), batches.from_step(5)
    for step in range(8):
        batch = next(from_start)
        assert torch.equal(batch, batches.load(step))
        if step >= 5:
            assert torch.equal(batch, next(from_five))
    from_start.close()
    from_five.close()


def test_a_batch_that_does_not_divide_over_the_processes_is_refused(small: SmallRun, datasets: list[ShardedDataset]):
    with pytest.raises(ConfigError, match="8 sequences does not divide over 3 processes"):
        Batches(small.experiment(), datasets, 0, 3)


def save_initial_weights(rank: int, small: SmallRun, folder: Path) -> None:
    """One of four processes: rank 0 keeps the weights that all have together."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=4)
    model = build_model(small.experiment(), World(rank, 4, torch.device("cpu"), dist.group.WORLD))
    weights = {name: p.full_tensor() for name, p in model.named_parameters()}
    if rank == 0:
        torch.save(weights, folder / "weights.pt")
    dist.destroy_process_group()


def test_initial_weights_of_four_processes_are_those_of_one_bitwise(small: SmallRun, tmp_path: Path):
    # A fork server, so that torch is imported once for the four.
    multiprocessing.set_forkserver_preload(["small_run"])
    start_processes(save_initial_weights, args=(small, tmp_path), nprocs=4, start_method="forkserver")
    four = torch.load(tmp_path / "weights.pt")
    experiment = small.experiment()
    one = dict(create_model(experiment.model_config_resolved(), seed=experiment.seed).named_parameters())
    assert four.keys() == one.keys()
    assert [name for name in one if not torch.equal(four[name], one[name])] == []
