"""Fixtures of the orchestration tests."""

import time
from collections.abc import Callable, Iterator

import dagster as dg
import pytest
from dagster._core.definitions.data_version import CachingStaleStatusResolver  # what the UI asks; no public name
from dagster._core.loader import LoadingContextForTest
from postgres_server import PostgresServer, programs
from tiny_pipeline import TinyPipeline

Status = dict[str, tuple[str, list[str]]]


@pytest.fixture
def stale_status() -> Callable[[TinyPipeline], Status]:
    """Asset -> (FRESH, STALE or MISSING, reasons) with the definitions as they are now: what the UI shows."""

    def status(pipeline: TinyPipeline) -> Status:
        with pipeline.active() as definitions, dg.DagsterInstance.get() as instance:
            graph = definitions.resolve_asset_graph()
            resolver = CachingStaleStatusResolver(instance, graph, LoadingContextForTest(instance))
            return {
                key.to_user_string(): (
                    resolver.get_status(key).value,
                    [f"{cause.category.value}: {cause.reason}" for cause in resolver.get_stale_causes(key)],
                )
                for key in graph.get_all_asset_keys()
            }

    return status


@pytest.fixture
def partition_status() -> Callable[[TinyPipeline, str], dict[str, str]]:
    """Partition of an asset -> FRESH, STALE or MISSING."""

    def status(pipeline: TinyPipeline, name: str) -> dict[str, str]:
        key = dg.AssetKey.from_user_string(name)
        with pipeline.active() as definitions, dg.DagsterInstance.get() as instance:
            graph = definitions.resolve_asset_graph()
            resolver = CachingStaleStatusResolver(instance, graph, LoadingContextForTest(instance))
            keys = graph.get(key).partitions_def.get_partition_keys(dynamic_partitions_store=instance)
            return {partition: resolver.get_status(key, partition).value for partition in keys}

    return status


@pytest.fixture(scope="module")
def postgres() -> Iterator[PostgresServer]:
    """A server of its own, which the variables of `deploy/dagster-postgres.yaml` name."""
    pytest.importorskip("dagster_postgres")
    found = programs()
    if found is None:
        pytest.skip("no PostgreSQL server is installed (Debian: apt-get install postgresql)")
    server = PostgresServer(found)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in server.variables.items():
            patch.setenv(name, value)
        yield server
    server.close()


@pytest.fixture
def wait_until() -> Callable[[Callable[[], bool], str], None]:
    """Wait for another process to bring something about."""

    def wait(condition: Callable[[], bool], what: str, seconds: float = 600.0) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, f"waited {seconds:.0f} s for {what}"
            time.sleep(0.05)

    return wait
