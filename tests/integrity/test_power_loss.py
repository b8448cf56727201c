"""The power goes at any change of the disk: the same command again makes what an undisturbed one makes, or names the
file in one line."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from commands import Ended
from power_loss import recorded, states
from stages import Result, Stage, before, evaluate, export, report, tokenize, train_one
from whole_home import make_whole_home

WRITES = (tokenize, train_one, evaluate, report, export)
SEED = os.environ.get("OPENLM_DRILL_SEED", "power")
SAMPLE = 6
"""States of each stage that CI looks at."""


def disturbed(stage: Stage, whole: Path, root: Path, most: int | None) -> dict[str, list[str]]:
    """How the same command ended after each of the states, or after so many of them: `right`, `named` or `silent`."""
    before(stage, whole, root)
    with recorded(root / "home") as moments:
        ended, expected = stage(root)
    assert ended.returncode == 0 and expected, ended
    assert {file for moment in moments for file in moment.lost_marks()} == set()
    every = list(states(moments))
    assert len(every) > len(moments) / 2 > 5
    some = every if most is None else random.Random(SEED).sample(every, min(most, len(every)))
    found: dict[str, list[str]] = {"right": [], "named": [], "silent": []}
    for what, state in some:
        shutil.rmtree(root / "home")
        state.write(root / "home")
        how, said = judged(root, *stage(root), expected)
        found[how].append(f"{stage.__name__} {what}: {said}")
    return found


def judged(root: Path, ended: Ended, result: Result, expected: Result) -> tuple[str, str]:
    """`right`, `named` where one line names a file of the home, or else `silent`; and why."""
    if ended.returncode:
        one_line = ended.stderr.startswith("error: ") and ended.stderr.count("\n") == 1
        return "named" if one_line and str(root / "home") in ended.stderr else "silent", ended.stderr
    other = sorted(name for name in {**expected, **result} if expected.get(name) != result.get(name))
    return "silent" if other else "right", f"other {', '.join(other)}"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_whole_home(tmp_path_factory)


@pytest.mark.parametrize("stage", WRITES, ids=lambda stage: stage.__name__)
def test_power_loss_changes_no_result(stage: Stage, whole: Path, tmp_path: Path) -> None:
    """A sample of the states, drawn by a seed."""
    found = disturbed(stage, whole, tmp_path / "root", SAMPLE)
    assert (found["named"], found["silent"]) == ([], [])


@pytest.mark.drill
@pytest.mark.parametrize("stage", WRITES, ids=lambda stage: stage.__name__)
def test_no_power_loss_changes_a_result(
    stage: Stage, whole: Path, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    found = disturbed(stage, whole, tmp_path / "root", None)
    record_property("counted", ", ".join(f"{len(states)} {how}" for how, states in found.items()))
    assert (found["named"], found["silent"]) == ([], [])
