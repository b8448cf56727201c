"""Fixtures of the crash drills."""

import contextlib
from collections.abc import Callable, Iterator

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
    with contextlib.ExitStack() as stack:

        def open_programs(pipeline: DrillPipeline) -> Programs:
            programs = Programs(pipeline, tmp_path / "logs")
            stack.enter_context(one_trainer(pipeline))  # left when the programs are gone
            stack.callback(programs.close)
            return programs

        yield open_programs
