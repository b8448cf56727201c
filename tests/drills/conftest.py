"""Fixtures of the crash drills."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from drill_pipeline import DrillPipeline, Programs, one_trainer
from once import made_once


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> DrillPipeline:
    """The pipeline after its job ran once and nothing went wrong; tests work on copies of it."""

    def make(folder: Path) -> None:
        assert DrillPipeline.create(folder / "pipeline").execute("tiny", torchrun=True).success

    return DrillPipeline(made_once(tmp_path_factory, "undisturbed", make) / "pipeline")


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
