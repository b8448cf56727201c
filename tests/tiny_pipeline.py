"""A pipeline small enough to run whole in seconds, with a home of its own: what orchestration and browser tests share.

The text is the standard library's; the experiment has two milestones, one training process and two tasks.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import sqlite3
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from once import made_once

if TYPE_CHECKING:  # what distributes the tests loads this file as well, and needs neither Dagster nor torch
    import dagster as dg

REPOSITORY = Path(__file__).parents[1]
LABELS = ("t0010K", "t0040K")
NOT_IN_JOBS = {"contamination/tiny_text/tiny"}
"""Assets that no job of a recipe makes."""
RECIPE = """
name: tiny
description: A pipeline that runs in seconds.
tokenizer: {{name: tiny_bpe, train: {{vocab_size: {vocab_size}}}}}
seq_len: 32
samples_per_shard: 1024
sources: [{{name: tiny_text, files: ["raw/tiny_text/*.jsonl"], max_bad_fraction: 0.5}}]
model: {{hidden_dim: 32, n_layers: 2, n_heads: 2}}
training: {{global_batch: {global_batch}, lr: 1.0e-3, schedule: constant}}
milestones: [10K, 40K]
evaluation: {{suite: "${{OPENLM_HOME}}/suite.yaml"}}
execution: {{log_every: 20}}
launcher: {{processes: 1}}
"""
SUITE = """
name: tiny
icl_tasks:
  - {label: last_word, dataset_uri: raw/tasks/last_word.jsonl, num_fewshot: [0], icl_task_type: language_modeling}
  - {label: choice, dataset_uri: raw/tasks/choice.jsonl, num_fewshot: [1], icl_task_type: multiple_choice}
"""


def _write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@dataclass(frozen=True)
class TinyPipeline:
    """A folder with recipes, raw files and all state of a tiny pipeline."""

    root: Path

    @property
    def home(self) -> Path:
        return self.root / "openlm_home"

    @property
    def run_folder(self) -> Path:
        return self.home / "runs" / "tiny" / "v1"

    @property
    def variables(self) -> dict[str, str]:
        """The environment in which programs work on this pipeline."""
        return {
            "OPENLM_HOME": str(self.home),
            "OPENLM_RECIPES": str(self.root / "recipes"),
            "DAGSTER_HOME": str(self.root / "dagster"),
            "OMP_NUM_THREADS": "1",
        }

    @classmethod
    def create(cls, root: Path, global_batch: int = 256, copies: int = 1) -> TinyPipeline:
        """A pipeline with nothing made yet, whose raw files hold 57,000 tokens `copies` times."""
        made = cls(root)
        for folder in ("recipes", "dagster", "openlm_home"):
            (root / folder).mkdir(parents=True)
        shutil.copy(REPOSITORY / ".dagster" / "dagster.yaml", root / "dagster")
        (made.home / "suite.yaml").write_text(SUITE)
        made.write_recipe(vocab_size=300, global_batch=global_batch)
        sources = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
        texts = [t for t in (p.read_text(errors="replace")[:4000] for p in sources) if len(t) > 1000]
        rows = [{"text": text} for text in texts[:60]] * copies
        _write_rows(made.home / "raw" / "tiny_text" / "a.jsonl", rows[:30])
        _write_rows(made.home / "raw" / "tiny_text" / "b.jsonl", rows[30:])
        lines = [line.split() for text in texts[60:80] for line in text.splitlines() if len(line.split()) > 6][:24]
        last = [{"context": " ".join(words[:-1]), "continuation": words[-1]} for words in lines]
        _write_rows(made.home / "raw" / "tasks" / "last_word.jsonl", last)
        choices = [
            {"query": row["context"], "choices": [row["continuation"], other["continuation"] + "x"], "gold": 0}
            for row, other in itertools.pairwise(last)
        ]
        _write_rows(made.home / "raw" / "tasks" / "choice.jsonl", choices)
        return made

    def write_recipe(self, vocab_size: int, global_batch: int = 256) -> None:
        recipe = RECIPE.format(vocab_size=vocab_size, global_batch=global_batch)
        (self.root / "recipes" / "tiny.yaml").write_text(recipe)

    def copy(self, to: Path) -> TinyPipeline:
        """The same pipeline in another folder, with its state and history."""
        shutil.copytree(self.root, to)
        return TinyPipeline(to)

    @contextlib.contextmanager
    def active(self, *recipes: str) -> Iterator[dg.Definitions]:
        """The definitions of its recipes, or of those named, as the files are at this moment, in its environment."""
        from openlm_pipeline.experiments import load_experiment
        from orchestration.definitions import build_definitions

        with pytest.MonkeyPatch.context() as patch:
            for name, value in self.variables.items():
                patch.setenv(name, value)
            yield build_definitions([load_experiment(name) for name in recipes or ("tiny",)])

    def instance(self) -> dg.DagsterInstance:
        """Its Dagster instance, to be closed by the caller."""
        import dagster as dg

        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("DAGSTER_HOME", str(self.root / "dagster"))
            return dg.DagsterInstance.get()

    def execute(
        self, job: str, recipes: tuple[str, ...] = (), *, tags: dict[str, str] | None = None, torchrun: bool = False
    ) -> dg.ExecuteInProcessResult:
        """Run a job to its end in this process; its trainer is a forked one, under torchrun only if told."""
        import dagster as dg
        from gloo_workers import forked_trainers

        trainers = forked_trainers(torchrun=torchrun)
        with self.active(*recipes) as definitions, _unsynced(), dg.DagsterInstance.get() as instance, trainers:
            return definitions.resolve_job_def(job).execute_in_process(
                instance=instance,
                raise_on_error=False,
                tags=tags,
                run_config={"resources": {"dask": {"config": {"workers": 1}}}, "loggers": {"live": {}}},
            )

    def snapshot(self, *parts: str) -> dict[str, tuple[int, int]]:
        """Size and modification time of each file below a folder of the home: unchanged if nobody wrote there."""
        folder = self.home.joinpath(*parts)
        files = [p for p in folder.rglob("*") if p.is_file()]
        return {str(p.relative_to(folder)): (p.stat().st_size, p.stat().st_mtime_ns) for p in files}


@contextlib.contextmanager
def _unsynced() -> Iterator[None]:
    """SQLite waits for no disk: Dagster commits some hundred times a run, and no test here loses power."""
    from sqlalchemy import event
    from sqlalchemy.engine import Engine

    def connected(connection: Any, record: Any) -> None:
        if isinstance(connection, sqlite3.Connection):
            connection.execute("PRAGMA synchronous=OFF")

    event.listen(Engine, "connect", connected)
    try:
        yield
    finally:
        event.remove(Engine, "connect", connected)


@dataclass(frozen=True)
class FinishedPipeline:
    """A pipeline whose job ran once. Tests work on copies of it."""

    pipeline: TinyPipeline

    def copy(self, to: Path) -> TinyPipeline:
        return self.pipeline.copy(to / "pipeline")

    @cached_property
    def all_events(self) -> list[dg.DagsterEvent]:
        """What Dagster recorded of that run."""
        with self.pipeline.instance() as instance:
            (run,) = instance.get_runs()
            return [entry.dagster_event for entry in instance.all_logs(run.run_id) if entry.dagster_event]


LONG = 64
"""The global batch that makes four times as many steps of a run, for drills that must interrupt it."""


def _make_finished(folder: Path, **settings: int) -> None:
    result = TinyPipeline.create(folder / "pipeline", **settings).execute("tiny", torchrun=True)
    failures = [
        event.step_failure_data.user_failure_data or event.step_failure_data.error
        for event in result.all_events
        if event.is_step_failure
    ]
    assert result.success, failures


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> FinishedPipeline:
    """The tiny pipeline after its job ran once from raw files to report, its trainer under torchrun.

    Its milestones are at steps 40 and 157.
    """
    return FinishedPipeline(TinyPipeline(made_once(tmp_path_factory, "tiny", _make_finished) / "pipeline"))


@pytest.fixture(scope="session")
def long_finished(tmp_path_factory: pytest.TempPathFactory) -> FinishedPipeline:
    """The same with milestones at steps 157 and 625."""
    made = made_once(tmp_path_factory, "long", partial(_make_finished, global_batch=LONG))
    return FinishedPipeline(TinyPipeline(made / "pipeline"))


@pytest.fixture
def instance_of() -> Iterator[Callable[[TinyPipeline], dg.DagsterInstance]]:
    """The Dagster instance of a pipeline, for reading what happened."""
    opened: list[dg.DagsterInstance] = []

    def open_instance(pipeline: TinyPipeline) -> dg.DagsterInstance:
        opened.append(pipeline.instance())
        return opened[-1]

    yield open_instance
    for instance in opened:
        instance.dispose()


def environment(pipeline: TinyPipeline | None = None, **more: str) -> dict[str, str]:
    """The environment of a program under test: nothing of the developer's own settings but the search paths."""
    kept = {k: os.environ[k] for k in ("PATH", "HOME", "LANG", "TMPDIR") if k in os.environ}
    return {**kept, "PYTHONPATH": str(REPOSITORY), **(pipeline.variables if pipeline else {}), **more}
