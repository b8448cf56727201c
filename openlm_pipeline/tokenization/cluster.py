"""The Dask cluster that runs both stages: a LocalCluster by default, or a scheduler by its address."""

import contextlib
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

from pydantic import Field

from openlm_pipeline.errors import MissingInputError
from openlm_pipeline.strict import Strict

if TYPE_CHECKING:
    from distributed import Client

ClientFactory = Callable[[], "AbstractContextManager[Client]"]
"""Starts or joins a cluster when there is work for it; a stage with nothing to do never calls it."""


class DaskSettings(Strict):
    """Where tokenization runs. Execution only: results do not depend on it."""

    address: str | None = None
    """Scheduler to join, such as `tcp://host:8786`; by default a LocalCluster is started and stopped."""
    workers: int = Field(default_factory=lambda: os.cpu_count() or 1, ge=1)
    """Worker processes of the LocalCluster, one thread each."""

    @contextlib.contextmanager
    def client(self) -> "Iterator[Client]":
        """A connected client.

        Raises:
            MissingInputError: no scheduler answers at `address`.
        """
        from distributed import Client, LocalCluster

        if self.address:
            try:
                client = Client(self.address, timeout="10s")
            except (OSError, ValueError) as e:
                raise MissingInputError(f"no Dask scheduler answers at {self.address}: {e}") from e
            with client:
                yield client
            return
        with (
            LocalCluster(
                n_workers=self.workers,
                threads_per_worker=1,
                host="127.0.0.1",
                dashboard_address="127.0.0.1:0",
                silence_logs=logging.CRITICAL,  # a task's error is raised where its result is asked for
            ) as cluster,
            Client(cluster) as client,
        ):
            yield client
