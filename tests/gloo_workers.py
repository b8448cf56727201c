"""Trainers and other ranks that join over gloo, forked from one server that has imported torch once.

For tests that want processes and not torchrun, whose agent and workers each take seconds to import what they need.
"""

import atexit
import importlib
import multiprocessing
import multiprocessing.forkserver
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from multiprocessing.context import ForkServerContext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch._dynamo  # noqa: F401 - like torch it is here to be imported before forking
from small_run import SmallRun, train_here

from openlm_pipeline.experiments import load_experiment

SECONDS = 600
"""How long ranks may take, which a busy machine needs by far not all of."""


@cache
def _server() -> ForkServerContext:
    """A server that has imported this module, computed nothing and so started no thread."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    with pytest.MonkeyPatch.context() as patch:
        # What it is to import it finds there; where it does not, it says nothing and each rank imports by itself.
        patch.setenv("PYTHONPATH", os.pathsep.join(path for path in sys.path if path))
        patch.setenv("OMP_NUM_THREADS", "1")
        multiprocessing.forkserver.ensure_running()
    return context


def stop() -> None:
    """End the server, so that it is not left behind, and what it used counts as time of this process's children."""
    if _server.cache_info().currsize:
        multiprocessing.forkserver._forkserver._stop()  # there is no public name
        _server.cache_clear()


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def _join(rank: int, processes: int, port: int) -> None:
    """What torchrun tells a worker."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(processes), "LOCAL_RANK": str(rank)}
    os.environ |= {"LOCAL_WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def _rank(rank: int, processes: int, port: int, function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    _join(rank, processes, port)
    function(*arguments)


def run_in_processes(processes: int, function: Callable[..., None], *arguments: Any) -> None:
    """Call `function(*arguments)` in each of several processes that have torchrun's variables; fails where one does.

    The function finds its rank in `RANK`. It is one that can be imported, and its arguments can be pickled.
    """
    context, port = _server(), _free_port()
    workers = [context.Process(target=_rank, args=(r, processes, port, function, arguments)) for r in range(processes)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(timeout=SECONDS)
        worker.kill()
        worker.join()
    assert [worker.exitcode for worker in workers] == [0] * processes


def _train(recipe: str, home: Any, overrides: tuple[str, ...]) -> None:
    train_here(load_experiment(recipe, overrides), home)


def train_in_processes(small: SmallRun, processes: int, *overrides: str) -> None:
    """Train a run to its last milestone; fails where a process does."""
    run_in_processes(processes, _train, str(small.recipe), small.home, overrides)


def _program(
    module: str, arguments: list[str], variables: dict[str, str], log: str, ranks: tuple[int, int, int]
) -> None:
    """`python -m MODULE ARGUMENTS` as one of several ranks, with its output in a file."""
    os.environ.clear()
    os.environ |= variables
    _join(*ranks)
    with Path(log).open("ab", buffering=0) as output:
        for stream in (1, 2):
            os.dup2(output.fileno(), stream)
    sys.argv = [module, *arguments]
    atexit._clear()  # what the server would do at its end
    code = importlib.import_module(f"{module}.__main__").main()
    atexit._run_exitfuncs()  # a forked process leaves them out, such as wandb's, which waits for its writers
    sys.exit(code)


def run_program(
    module: str, arguments: Sequence[str], variables: Mapping[str, str], log: Path, processes: int
) -> list[int]:
    """`torchrun --nproc-per-node=PROCESSES -m MODULE ARGUMENTS` without torchrun; the ranks' exit codes."""
    context, port = _server(), _free_port()
    given = (module, list(arguments), dict(variables), str(log))
    workers = [context.Process(target=_program, args=(*given, (r, processes, port))) for r in range(processes)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(timeout=SECONDS)
        worker.kill()
        worker.join()
    return [worker.exitcode for worker in workers]


class _ForkedTrainer:
    """What `subprocess.Popen` gives for torchrun with one worker: that worker alone, forked from the server."""

    def __init__(self, command: list[str], *, env: Mapping[str, str], stdout: Any, **_: Any) -> None:
        assert "--nproc-per-node=1" in command, command
        arguments = command[command.index("train") + 1 :]
        ranks = (0, 1, _free_port())
        self._process = _server().Process(target=_program, args=("train", arguments, dict(env), stdout.name, ranks))
        self._process.start()
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired("train", timeout or 0)
        return self._process.exitcode

    def terminate(self) -> None:
        os.kill(self.pid, signal.SIGTERM)

    def kill(self) -> None:
        self._process.kill()


@contextmanager
def forked_trainers() -> Iterator[None]:
    """The local launcher starts its trainer without torchrun, for tests of what is done before and after training."""
    from openlm_pipeline.runs.launchers import local

    forked = SimpleNamespace(
        Popen=_ForkedTrainer, STDOUT=subprocess.STDOUT, PIPE=subprocess.PIPE, TimeoutExpired=subprocess.TimeoutExpired
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(local, "subprocess", forked)
        yield
