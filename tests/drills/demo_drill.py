"""`openlm demo`, killed six times on its way, makes what an undisturbed one makes: `python tests/drills/demo_drill.py`.

In turn: the run's process while it tokenizes; a Dask worker (the run continues), then torchrun; a rank; the run's
process while it trains, and while it scores. Takes two demos' time and a start per kill.
"""

import contextlib
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import psutil

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

from drill_pipeline import DrillPipeline, Programs, kill, one_trainer, wait_until
from tiny_pipeline import REPOSITORY

LABELS = ("t0200K", "t0400K", "t0800K")
_DONE, _FAILED, _KILLED = 0, 1, -signal.SIGKILL


class DemoPipeline(DrillPipeline):
    """The demo with a home and a Dagster of its own."""

    name = "demo"

    @classmethod
    def create(cls, root: Path) -> "DemoPipeline":
        for folder in ("recipes", "dagster"):
            (root / folder).mkdir(parents=True)
        shutil.copy(REPOSITORY / ".dagster" / "dagster.yaml", root / "dagster")
        return cls(root)


def _orchestration(pipeline: DemoPipeline) -> list[psutil.Process]:
    return [p for p in pipeline.processes() if p.cmdline()[2:3] == ["orchestration"]]


def _workers(pipeline: DemoPipeline) -> list[psutil.Process]:
    """Dask's, once they have begun a file."""
    begun = any((pipeline.home / "tokenized").rglob("*.tmp*"))
    below = [p for run in _orchestration(pipeline) for p in run.children(recursive=True)] if begun else []
    return [p for p in below if "spawn_main" in " ".join(p.cmdline())]


def _half_tokenized(pipeline: DemoPipeline) -> list[psutil.Process]:
    return _orchestration(pipeline) if _workers(pipeline) else []


def _past(step: int, victims: Callable[[DemoPipeline], list]) -> Callable[[DemoPipeline], list]:
    return lambda pipeline: victims(pipeline) if pipeline.last_step() > step else []


def _scoring(pipeline: DemoPipeline) -> list[psutil.Process]:
    return _orchestration(pipeline) if pipeline.scored(LABELS[0]) else []


Kill = tuple[str, Callable[[DemoPipeline], list[psutil.Process]]]
STARTS: tuple[tuple[tuple[Kill, ...], int], ...] = (
    ((("the run while it tokenizes", _half_tokenized),), _KILLED),
    (
        (
            ("a Dask worker", lambda pipeline: _workers(pipeline)[:1]),
            ("torchrun", _past(20, DemoPipeline.torchruns)),
        ),
        _FAILED,
    ),
    ((("a rank", _past(60, lambda pipeline: pipeline.ranks().get(1, []))),), _FAILED),
    ((("the run while it trains", _past(110, _orchestration)),), _KILLED),
    ((("the run while it scores", _scoring),), _KILLED),
    ((), _DONE),
)
"""What is killed under each start, and the exit code of `openlm demo` then."""


def drill(root: Path, say: Callable[[str], None]) -> None:
    """Raises AssertionError where something was lost, done twice, or is another than undisturbed."""
    pipeline = DemoPipeline.create(root / "killed")
    programs = Programs(pipeline, root / "logs")
    began = time.monotonic()
    done: dict[str, tuple[int, int]] = {}
    with contextlib.closing(programs), one_trainer(pipeline):
        for kills, code in STARTS:
            demo = programs.start("-m", "openlm_pipeline", "demo")
            say(f"{time.monotonic() - began:5.0f} s  started")
            for what, victims in kills:
                found: list[psutil.Process] = []
                wait_until(
                    lambda v=victims, f=found: f.extend(v(pipeline)) or f,
                    f"the moment to kill {what}",
                    demo,
                    seconds=3600,
                )
                kill(*found)
                say(f"{time.monotonic() - began:5.0f} s  killed {what}")
            ended = demo.wait(timeout=3600)
            say(f"{time.monotonic() - began:5.0f} s  ended with exit code {ended}")
            assert ended in (code, code % 256), programs.printed()
            wait_until(lambda: not pipeline.ranks() and not _workers(pipeline), "trainers and workers to be gone")
            now = pipeline.finished_work()
            assert {name: now.get(name) for name in done} == done
            done = now
    say(f"{time.monotonic() - began:5.0f} s  done, and now undisturbed")
    undisturbed = DemoPipeline.create(root / "undisturbed")
    programs = Programs(undisturbed, root / "undisturbed_logs")
    with contextlib.closing(programs):
        programs.finish("-m", "openlm_pipeline", "demo")
    results, expected = pipeline.results(), undisturbed.results()
    assert set(expected["scorecards"]) == set(LABELS)
    for part, value in expected.items():
        assert results[part] == value, part
    say(f"{time.monotonic() - began:5.0f} s  both made the same")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(prefix="demo-drill-") as folder:
        drill(Path(folder), lambda line: print(line, flush=True))
