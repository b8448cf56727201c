"""Workers that hang under torchrun."""

import json
import re
from pathlib import Path

import psutil
import pytest
from gloo_workers import SECONDS, exit_codes, ranks_of, torchrun
from small_run import SmallRun
from waiting import wait_until

from openlm_pipeline.checkpoints.folders import list_checkpoints, verify
from train.hooks.watchdog import EXIT_CODE, Watchdog


def last_step(small: SmallRun) -> int:
    return max(small.losses(), default=0)


def assert_intact(small: SmallRun) -> None:
    for checkpoint in list_checkpoints(small.run.checkpoints, small.run.fingerprint, warn=pytest.fail):
        verify(checkpoint)


def test_a_hang_is_written_down_and_ends_the_run(tmp_path: Path):
    """Rank 1 is stopped as by a debugger; rank 0 waits for it, and then no longer."""
    small = SmallRun(tmp_path, (10, 5000))
    launcher = torchrun(small, 2, "execution.hang_seconds=3")
    wait_until(lambda: last_step(small) > 15, launcher)
    ranks = ranks_of(launcher)
    try:
        ranks[1].suspend()
        wait_until(lambda: not ranks[0].is_running() or ranks[0].status() == psutil.STATUS_ZOMBIE, seconds=300)
    finally:
        ranks[1].resume()
    assert launcher.wait(SECONDS) != 0
    outcome = small.run.read_outcome()
    assert outcome["status"] == "failed" and outcome["reason"].startswith("hang: a step took over 3 seconds")
    assert f"exitcode  : {EXIT_CODE}" in small.log()
    stacks = (small.run.path / "hangs" / "stacks-rank-0.txt").read_text()
    assert "in _train_to" in stacks
    record = json.loads((small.run.path / "hangs" / "collectives-rank-0.json").read_text())
    assert record["entries"]  # the last collectives, with their sizes and states
    assert_intact(small)


def hold_the_lock(hangs: Path) -> None:
    watchdog = Watchdog(0.5, hangs, 0, print)
    with watchdog.watching():
        for _ in range(2):
            watchdog.step()
            watchdog.pause()
        watchdog.step()
        re.match(r"(a+)+$", "a" * 64 + "b")  # takes longer than anyone waits, and no other thread runs meanwhile


def test_a_hang_in_which_no_thread_of_python_runs_ends_too(tmp_path: Path):
    assert exit_codes(1, hold_the_lock, tmp_path) == [1]
    assert "in match" in (tmp_path / "stacks-rank-0.txt").read_text()
