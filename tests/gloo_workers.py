"""Trainers and other ranks that join over gloo, forked from one server that has imported torch once.

For tests that want processes and not torchrun, whose agent and workers each take seconds to import what they need.
"""

import atexit
import multiprocessing
import multiprocessing.forkserver
import os
import runpy
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import cache
from multiprocessing.context import ForkServerContext
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from small_run import SmallRun, train_here

from openlm_pipeline.experiments import load_experiment

PRELOADED = (
    "distributed",
    "numpy.ma",
    "openlm_pipeline.cli.main",
    "openlm_pipeline.runs.launchers.kubernetes",
    "openlm_pipeline.runs.upload",
    "openlm_pipeline.tokenization.job",
    "openlm_pipeline.tokenization.packing_job",
    "torch._dynamo",
    "torch.distributed.run",
    "train.hooks.averages",
    "train.profile",
    "train.reporting",
    "train.stability",
    "train.validation",
)
"""What ranks, torchrun and Dask's workers import besides this module."""
TORCHRUNS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
SECONDS = 600
"""How long ranks may take, which a busy machine needs by far not all of."""


@cache
def _server() -> ForkServerContext:
    """A server that has imported this module, computed nothing and so started no thread."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, *PRELOADED])
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
    values = (rank, processes, rank, processes, "127.0.0.1", port)
    os.environ |= dict(zip(TORCHRUNS, map(str, values)))


def _rank(rank: int, processes: int, port: int, function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    _join(rank, processes, port)
    function(*arguments)


def exit_codes(processes: int, function: Callable[..., None], *arguments: Any) -> list[int]:
    """Call `function(*arguments)` in each of several processes that have torchrun's variables; how each ended.

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
    return [worker.exitcode for worker in workers]


def run_in_processes(processes: int, function: Callable[..., None], *arguments: Any) -> None:
    """As `exit_codes`, and fails where one of the processes does."""
    assert exit_codes(processes, function, *arguments) == [0] * processes


def _train(recipe: str, home: Any, overrides: tuple[str, ...]) -> None:
    train_here(load_experiment(recipe, overrides), home)


def train_in_processes(small: SmallRun, processes: int, *overrides: str) -> None:
    """Train a run to its last milestone; fails where a process does."""
    run_in_processes(processes, _train, str(small.recipe), small.home, overrides)


def _become(variables: dict[str, str], log: str) -> None:
    """Take on what a program is started with: its environment, and a file for its output."""
    os.environ.clear()
    os.environ |= variables
    with Path(log).open("ab", buffering=0) as output:
        for stream in (1, 2):
            os.dup2(output.fileno(), stream)
    atexit._clear()  # what the server would do at its end


def _run_main(module: str, arguments: list[str]) -> int:
    """`python -m MODULE ARGUMENTS` in this process; its exit code."""
    sys.argv = [module, *arguments]
    code = None
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as e:
        code = e.code
    atexit._run_exitfuncs()  # a forked process leaves them out, such as wandb's, which waits for its writers
    return code or 0


def _program(module: str, arguments: list[str], variables: dict[str, str], log: str) -> None:
    """`python -m MODULE ARGUMENTS` with its output in a file, and torchrun's variables as they are."""
    torchruns = {name: os.environ[name] for name in TORCHRUNS}
    _become({**variables, **torchruns}, log)
    sys.exit(_run_main(module, arguments))


def run_program(
    module: str, arguments: Sequence[str], variables: Mapping[str, str], log: Path, processes: int
) -> list[int]:
    """`torchrun --nproc-per-node=PROCESSES -m MODULE ARGUMENTS` without torchrun; the ranks' exit codes."""
    return exit_codes(processes, _program, module, list(arguments), dict(variables), str(log))


def _worker(module: str, *arguments: str) -> None:
    """What torchrun starts: `python -m MODULE ARGUMENTS`, here in a process that has torch already."""
    os.setsid()  # as torchrun's own
    torch.set_num_threads(1)
    Path("/proc/self/comm").write_text(f"{RANK}{os.environ['RANK']}")  # /proc has not the environment of forked ones
    if code := _run_main(module, list(arguments)):
        sys.exit(code)


def _torchrun(arguments: list[str], variables: dict[str, str], log: str) -> None:
    """`torchrun ARGUMENTS`: its own command line, agent and signals, but workers that are forked from it."""
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import MultiprocessContext

    _become(variables, log)
    os.setsid()
    read, close = run.config_from_args, MultiprocessContext._close

    def config_from_args(arguments: Any) -> tuple[Any, Callable[..., None], list[str]]:
        config, _, _ = read(arguments)
        words = arguments.training_script_args
        return config, _worker, [arguments.training_script, *words] if arguments.module else words

    def close_and_let_go(context: MultiprocessContext, *arguments: Any, **options: Any) -> None:
        context._worker_finished_event.set()  # a worker that ended well waits for this, and is no program that waits
        close(context, *arguments, **options)

    run.config_from_args, MultiprocessContext._close = config_from_args, close_and_let_go
    run.main(["--start-method=fork", *arguments])


RANK = "rank-"
"""Name of a forked worker's process, before its rank."""


def ranks_of(launcher: psutil.Process) -> dict[int, psutil.Process]:
    """Rank -> process of the workers below a forked torchrun."""
    found = {}
    for process in launcher.children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if (name := process.name()).startswith(RANK):
                found[int(name.removeprefix(RANK))] = process
    return found


class Forked(psutil.Process):
    """A program that was forked from the server, with what `psutil.Popen` has besides."""

    def __init__(self, target: Callable[..., None], *arguments: Any) -> None:
        self._forked = _server().Process(target=target, args=arguments)
        self._forked.start()
        super().__init__(self._forked.pid)

    @property
    def returncode(self) -> int | None:
        return self._forked.exitcode

    def poll(self) -> int | None:
        return self._forked.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._forked.join(timeout)
        if self._forked.exitcode is None:
            raise subprocess.TimeoutExpired("forked", timeout or 0)
        return self._forked.exitcode

    def terminate(self) -> None:
        with suppress(psutil.NoSuchProcess):
            super().terminate()

    def kill(self) -> None:
        with suppress(psutil.NoSuchProcess):
            super().kill()


def forked_torchrun(*arguments: str, variables: Mapping[str, str], log: Path) -> Forked:
    """`torchrun ARGUMENTS` in a session of its own, whose processes find all imports done."""
    return Forked(_torchrun, list(arguments), dict(variables), str(log))


def _alone(module: str, arguments: list[str], variables: dict[str, str], log: str) -> None:
    _become(variables, log)
    os.setsid()
    sys.exit(_run_main(module, arguments))


def forked_program(module: str, *arguments: str, variables: Mapping[str, str], log: Path) -> Forked:
    """`python -m MODULE ARGUMENTS` in a session of its own, which finds imports done."""
    return Forked(_alone, module, list(arguments), dict(variables), str(log))


def torchrun(small: SmallRun, processes: int, *overrides: str, flags: tuple[str, ...] = ()) -> Forked:
    """`torchrun FLAGS -m train` on a run; what it prints goes to the end of its log."""
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "OPENLM_HOME": str(small.home.root)}
    line = ("--standalone", f"--nproc-per-node={processes}", *flags, "-m", "train", str(small.recipe), *overrides)
    return forked_torchrun(*line, variables=variables, log=small.log_file)


def trainer(small: SmallRun, *overrides: str) -> Forked:
    """`python -m train` on a run, without torchrun; what it prints goes to the run's log."""
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "OPENLM_HOME": str(small.home.root)}
    program = ("train", [str(small.recipe), *overrides], variables, str(small.log_file))
    return Forked(_rank, 0, 1, _free_port(), _program, program)


def _popen(command: list[str], *, env: Mapping[str, str], stdout: Any, **_: Any) -> Forked:
    """What `subprocess.Popen` gives for the launcher's torchrun: a forked one."""
    after = command[command.index("torch.distributed.run") + 1 :]
    return forked_torchrun(*after, variables=env, log=Path(stdout.name))


@contextmanager
def _popen_and_wait(command: list[str], *, env: Mapping[str, str], **_: Any) -> Iterator[Forked]:
    """What `subprocess.Popen` gives for a torchrun whose output is read: a forked one that has ended."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "output"
        forked = _popen(command, env=env, stdout=SimpleNamespace(name=log))
        forked.wait(SECONDS)
        with log.open() as forked.stdout:
            yield forked


def _popen_trainer(command: list[str], *, env: Mapping[str, str], stdout: Any, **_: Any) -> Forked:
    """What `subprocess.Popen` gives for the launcher's torchrun with one worker: that worker alone."""
    assert "--nproc-per-node=1" in command, command
    arguments = command[command.index("train") + 1 :]
    return Forked(_rank, 0, 1, _free_port(), _program, ("train", arguments, dict(env), stdout.name))


@contextmanager
def forked_workers() -> Iterator[None]:
    """Workers of a Dask LocalCluster are forked, too."""
    import dask
    import distributed  # noqa: F401 - its defaults, once the setting is there, would go with it

    _server()  # before Dask starts one that has not imported torch
    with dask.config.set({"distributed.worker.multiprocessing-method": "forkserver"}):
        yield


@contextmanager
def _started_by(module: ModuleType, popen: Callable[..., Any]) -> Iterator[None]:
    """Whatever a module starts through `subprocess.Popen` is started by another function."""
    forked = SimpleNamespace(**{**vars(subprocess), "Popen": popen})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "subprocess", forked)
        yield


def forked_trainers(*, torchrun: bool = False) -> AbstractContextManager[None]:
    """The local launcher starts its trainer by forking, and without torchrun unless told.

    The latter is for tests of what is done before and after training.
    """
    from openlm_pipeline.runs.launchers import local

    return _started_by(local, _popen if torchrun else _popen_trainer)


def forked_scorers() -> AbstractContextManager[None]:
    """Evaluation by several processes forks its torchrun."""
    from openlm_pipeline.pipeline import evaluation

    return _started_by(evaluation, _popen_and_wait)
