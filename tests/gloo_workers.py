"""Training in several real processes that join over gloo, started from one server that has imported torch once.

For tests that want processes and not torchrun, whose workers each take seconds to import what they need.
"""

import multiprocessing
import os
import socket

import torch
from small_run import SmallRun, train_here

from openlm_pipeline.experiments import load_experiment
from openlm_pipeline.storage.home import Home


def _train(rank: int, processes: int, port: int, recipe: str, home: Home, overrides: tuple[str, ...]) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(processes), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    train_here(load_experiment(recipe, overrides), home)


def train_in_processes(small: SmallRun, processes: int, *overrides: str) -> None:
    """Train a run to its last milestone; fails where a process does."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    arguments = (processes, port, str(small.recipe), small.home, overrides)
    workers = [context.Process(target=_train, args=(rank, *arguments)) for rank in range(processes)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(timeout=120)
        worker.kill()
        worker.join()
    assert [worker.exitcode for worker in workers] == [0] * processes
