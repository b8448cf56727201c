"""Where the tasks of both stages run: this process, a LocalCluster, a Dask scheduler, or a cluster that Dask starts.

A `Pool` runs named calls and yields their results as they come. Results never depend on the pool: a task whose worker
dies is run again elsewhere, and what a task writes appears whole or not at all.
"""

import contextlib
import logging
import multiprocessing
import os
import secrets
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from pydantic import Field, ValidationError, model_validator

from openlm_pipeline.errors import ClusterError, ConfigError, DataError, MissingInputError
from openlm_pipeline.result import ProgressLine, Say
from openlm_pipeline.strict import Strict, expand_variables, explain, read_mapping
from openlm_pipeline.waits import waiting_for

if TYPE_CHECKING:
    from distributed import Client

Facts = dict[str, int]
"""Numbers of one task so far, such as `raw_bytes` read and `tokens` written."""
TaskProgress = Callable[[Facts], None]
"""Every task gets one as its keyword argument `progress`."""
Call = tuple[Any, ...]
"""A function and its arguments."""

CLUSTERS = {
    "slurm": ("dask_jobqueue", "SLURMCluster"),
    "pbs": ("dask_jobqueue", "PBSCluster"),
    "sge": ("dask_jobqueue", "SGECluster"),
    "lsf": ("dask_jobqueue", "LSFCluster"),
    "oar": ("dask_jobqueue", "OARCluster"),
    "htcondor": ("dask_jobqueue", "HTCondorCluster"),
    "kubernetes": ("dask_kubernetes.operator", "KubeCluster"),
}
_PROGRESS_SECONDS = 1.0


class Pool(Protocol):
    """Runs tasks."""

    workers: int
    """How many tasks can run at once."""

    def run(self, calls: dict[str, Call], on_progress: Callable[[str, Facts], None]) -> Iterator[tuple[str, Any]]:
        """Run each named call; yield (name, result) as they end, and raise the first error.

        The result of a call that found damaged data is the `DataError`, so that one run finds all that is damaged.

        Args:
            on_progress: gets a task's name and its numbers so far, about once per second.
        """
        ...


PoolFactory = Callable[[Say], "AbstractContextManager[Pool]"]
"""Starts or joins a pool when there is work for it; a stage with nothing to do never calls it."""


class InProcess:
    """One task after the other, here."""

    workers = 1

    def run(self, calls: dict[str, Call], on_progress: Callable[[str, Facts], None]) -> Iterator[tuple[str, Any]]:
        for name, (function, *arguments) in calls.items():

            def progress(facts: Facts, name: str = name) -> None:
                on_progress(name, facts)

            try:
                result = function(*arguments, progress=progress)
            except DataError as e:
                result = e
            yield name, result


def _on_worker(topic: str, name: str, function: Callable[..., Any], *arguments: Any) -> Any:
    """Run a task in a Dask worker, sending its numbers to the client."""
    from distributed import get_worker

    worker, sent = get_worker(), 0.0

    def progress(facts: Facts) -> None:
        nonlocal sent
        if time.monotonic() - sent >= _PROGRESS_SECONDS:
            sent = time.monotonic()
            worker.log_event(topic, {"name": name, "facts": facts})

    try:
        return function(*arguments, progress=progress)
    except DataError as e:
        return e


def dask_setup(worker: Any) -> None:
    """What Dask calls in each worker of a cluster of ours: Ctrl-C is the client's, which ends its workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


class DaskPool:
    """Tasks on the workers of a Dask client."""

    def __init__(self, client: "Client", workers: int) -> None:
        self.client = client
        self.workers = workers

    def run(self, calls: dict[str, Call], on_progress: Callable[[str, Facts], None]) -> Iterator[tuple[str, Any]]:
        """As `Pool.run`.

        Raises:
            ClusterError: workers died again and again under one task.
        """
        from concurrent.futures import CancelledError

        from distributed import KilledWorker, as_completed

        topic = f"openlm-{secrets.token_hex(4)}"
        self.client.subscribe_topic(topic, lambda event: on_progress(event[1]["name"], event[1]["facts"]))
        futures = {
            self.client.submit(
                _on_worker, topic, name, *call, pure=False, key=f"{call[0].__name__}-{name}-{topic}"
            ): name
            for name, call in calls.items()
        }
        try:
            for future in as_completed(list(futures)):
                yield futures[future], future.result()
        except KilledWorker as e:
            raise ClusterError(
                f"{e.allowed_failures + 1} workers died one after the other while they ran {futures[future]!r}; "
                "a worker that is killed often had too little memory"
            ) from e
        except CancelledError as e:
            raise ClusterError(f"the Dask scheduler is gone or dropped the work ({e}); run the command again") from e
        finally:
            self.client.unsubscribe_topic(topic)
            self.client.cancel(list(futures), reason="the stage ended")


def _ask(address: str, wait_seconds: float) -> None:
    """Whether a scheduler answers; a client alone would wait for ever for a port that accepts and says nothing.

    Raises:
        OSError: it does not in time.
        ValueError: there is no such protocol.
    """
    import asyncio

    from distributed.core import rpc

    async def identity() -> None:
        async with rpc(address) as scheduler:
            await asyncio.wait_for(scheduler.identity(), wait_seconds)

    try:
        asyncio.run(identity())
    except asyncio.TimeoutError as e:
        raise TimeoutError("no answer") from e


class DaskSettings(Strict):
    """Where tokenization runs. Execution only: results do not depend on it."""

    cluster: Literal["local", "slurm", "pbs", "sge", "lsf", "oar", "htcondor", "kubernetes"] = "local"
    """`local`: worker processes on this machine; `kubernetes`: dask-kubernetes; the others: dask-jobqueue."""
    options: dict[str, Any] = {}
    """Arguments of the cluster's class, such as `queue`, `cores`, `memory`, `walltime` of dask-jobqueue."""
    address: str | None = None
    """A running scheduler to join instead, such as `tcp://host:8786`."""
    workers: int = Field(default_factory=lambda: os.cpu_count() or 1, ge=1)
    """Worker processes; of a `local` cluster one thread each, and with 1 all runs in this process, without Dask."""
    wait_seconds: float = Field(default=60, gt=0)
    """How long to wait for a scheduler that does not answer, and for a first worker."""

    @model_validator(mode="after")
    def _one_place(self) -> "DaskSettings":
        if self.address and self.cluster != "local":
            raise ValueError("give 'address' or 'cluster', not both")
        return self

    @classmethod
    def from_env(cls, **overrides: Any) -> "DaskSettings":
        """The settings of the YAML file that OPENLM_DASK names, if it names one; `overrides` that are not None win.

        Raises:
            ConfigError: a field is wrong or unknown.
        """
        file = os.environ.get("OPENLM_DASK")
        fields = expand_variables(read_mapping(Path(file)), Path(file)) if file else {}
        try:
            return cls(**{**fields, **{k: v for k, v in overrides.items() if v is not None}})
        except ValidationError as e:
            raise explain(e, f"the Dask cluster of {file}" if file else "the Dask cluster") from e

    @contextlib.contextmanager
    def pool(self, report: Say) -> Iterator[Pool]:
        """A pool that is ready for work.

        Raises:
            MissingInputError: no scheduler answers at `address`, or no worker came in time.
            ConfigError: the cluster's library is missing, or refuses its options.
            ClusterError: the cluster did not start.
        """
        if self.cluster == "local" and not self.address and self.workers == 1:
            yield InProcess()
            return
        from distributed import Client

        for handler in logging.getLogger("distributed").handlers:
            handler.setLevel(logging.CRITICAL)  # what goes wrong is raised where a result is asked for
        with contextlib.ExitStack() as stack:
            try:
                if self.address:
                    with waiting_for(f"the Dask scheduler at {self.address}, up to {self.wait_seconds:g} s"):
                        _ask(self.address, self.wait_seconds)
                where = self.address or stack.enter_context(self._start())
                client = stack.enter_context(Client(where, timeout=self.wait_seconds))
            except (OSError, ValueError) as e:
                raise MissingInputError(
                    f"no Dask scheduler answers at {self.address or self.cluster} within {self.wait_seconds:g} s "
                    f"({e or type(e).__name__})"
                ) from e
            except RuntimeError as e:  # what distributed raises of a worker that dies as it starts
                raise ClusterError(f"the Dask cluster did not start: {e}; run the command again") from e
            report(ProgressLine(f"Dask dashboard: {client.dashboard_link}", {"dask_dashboard": client.dashboard_link}))
            try:
                with waiting_for(f"a first Dask worker, up to {self.wait_seconds:g} s"):
                    client.wait_for_workers(1, timeout=self.wait_seconds)
            except TimeoutError as e:
                raise MissingInputError(
                    f"no Dask worker came within {self.wait_seconds:g} s; look at the cluster's queue and logs, or "
                    "raise wait_seconds"
                ) from e
            yield DaskPool(client, max(self.workers if not self.address else 1, sum(client.nthreads().values())))

    def _start(self) -> AbstractContextManager[Any]:
        if self.cluster == "local":
            from distributed import LocalCluster

            try:
                return LocalCluster(
                    n_workers=self.workers,
                    threads_per_worker=1,
                    host="127.0.0.1",
                    dashboard_address="127.0.0.1:0",
                    # A worker's memory is bounded by the stages; a limit here would count pages of mapped files, too.
                    memory_limit=None,
                    silence_logs=logging.CRITICAL,  # of its workers, too
                    **{"preload": [__name__], **self.options},
                )
            except BaseException:  # stopped while its workers start, which nobody else would end
                for child in multiprocessing.active_children():
                    if "Dask" in child.name:
                        child.kill()
                raise
        module, name = CLUSTERS[self.cluster]
        try:
            make = getattr(import_module(module), name)
        except ImportError as e:
            package = module.partition(".")[0].replace("_", "-")
            raise ConfigError(
                f"dask cluster {self.cluster!r} needs the package {package}: pip install {package}"
            ) from e
        if self.cluster == "kubernetes":
            return make(n_workers=self.workers, **self.options)
        cluster = make(**self.options)
        cluster.scale(self.workers)
        return cluster
