"""Fixtures of the crash drills."""

from collections.abc import Callable, Iterator

import dagster as dg
import pytest
from drill_pipeline import DrillPipeline, Programs, one_trainer


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> DrillPipeline:
    """The pipeline after its job ran once and nothing went wrong; tests work on copies of it."""
    pipeline = DrillPipeline.create(tmp_path_factory.mktemp("undisturbed") / "pipeline")
    assert pipeline.execute("tiny").success
    return pipeline


@pytest.fixture
def programs_on(tmp_path) -> Iterator[Callable[[DrillPipeline], Programs]]:
    """Programs on a pipeline, all killed at the end; never two trainers of it at once."""
    opened: list[Programs] = []

    def open_programs(pipeline: DrillPipeline) -> Programs:
        opened.append(Programs(pipeline, tmp_path / "logs"))
        watching.append(one_trainer(pipeline))
        watching[-1].__enter__()
        return opened[-1]

    watching: list = []
    yield open_programs
    for programs in opened:
        programs.close()
    for watch in watching:
        watch.__exit__(None, None, None)


@pytest.fixture
def instance_of() -> Iterator[Callable[[DrillPipeline], dg.DagsterInstance]]:
    """The Dagster instance of a pipeline, for reading what happened."""
    opened: list[dg.DagsterInstance] = []

    def open_instance(pipeline: DrillPipeline) -> dg.DagsterInstance:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("DAGSTER_HOME", str(pipeline.root / "dagster"))
            opened.append(dg.DagsterInstance.get())
        return opened[-1]

    yield open_instance
    for instance in opened:
        instance.dispose()
