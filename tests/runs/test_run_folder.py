"""The run folder's records: metrics of resumed and killed runs, and the claim on it."""

import json
import tracemalloc
from pathlib import Path

import pytest
from small_run import SmallRun

from openlm_pipeline.errors import BusyError, IdentityError
from openlm_pipeline.runs import folder
from openlm_pipeline.runs.folder import RunFolder


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    tmp_path.joinpath("v1").mkdir()
    return RunFolder(tmp_path / "v1")


def test_a_resumed_runs_metrics_hold_each_step_once_the_last_record_standing(run: RunFolder):
    for step, loss in [(1, 5.0), (2, 4.0), (3, 3.0), (2, 4.5), (3, 3.5)]:
        run.append_metrics({"step": step, "loss": loss})
    run.append_metrics({"step": 3, "validation_loss": 3.7})
    records = run.read_metrics()
    assert [(r["step"], r["loss"]) for r in records if "loss" in r] == [(1, 5.0), (2, 4.5), (3, 3.5)]
    assert [r["validation_loss"] for r in records if "validation_loss" in r] == [3.7]


def test_very_many_records_are_read_in_little_memory(run: RunFolder, monkeypatch: pytest.MonkeyPatch):
    """Thinned evenly, down to the newest; what tells of something else than losses is all there."""
    monkeypatch.setattr(folder, "_MOST_RECORDS", 100)
    losses = [{"step": step, "tokens": 256 * step, "loss": 1 / step, "lr": 1e-3} for step in range(1, 20_001)]
    lines = [*losses, {"step": 20_000, "validation_loss": 0.5}, {"step": 7, "skipped": "it is a spike"}]
    run.metrics_file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    tracemalloc.start()
    try:
        records = run.read_metrics()
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()
    steps = [r["step"] for r in records if "loss" in r]
    assert 100 <= len(steps) <= 200 and steps[-1] == 20_000
    assert len({b - a for a, b in zip(steps, steps[1:])}) <= 2
    assert records[-1] == {"step": 20_000, "validation_loss": 0.5}
    assert [r["step"] for r in run.skipped_steps()] == [7]


def test_a_line_cut_short_by_a_kill_is_passed_over_and_hides_nothing_after_it(run: RunFolder):
    run.append_metrics({"step": 1, "loss": 5.0})
    with run.metrics_file.open("a") as f:
        f.write('{"step": 2')  # as long as the end of a line that has a sum
    assert [r["step"] for r in run.read_metrics()] == [1]
    run.append_metrics({"step": 2, "loss": 4.0})
    run.append_metrics({"step": 3, "loss": 3.0})
    assert [r["step"] for r in run.read_metrics()] == [1, 2, 3]


def test_a_run_without_metrics_has_none(run: RunFolder):
    assert run.read_metrics() == []
    assert run.read_outcome() is None


def test_an_outcome_stands_until_it_is_cleared(run: RunFolder):
    run.write_outcome("failed", 3, 768, reason="loss is nan")
    assert run.read_outcome().items() >= {"status": "failed", "step": 3, "tokens": 768, "reason": "loss is nan"}.items()
    run.clear_outcome()
    run.clear_outcome()
    assert run.read_outcome() is None


def test_a_folder_belongs_to_the_run_that_claimed_it(run: RunFolder, tmp_path: Path):
    experiment = SmallRun(tmp_path, (2,)).experiment()
    mine, other = {"training": {"lr": 0.1, "eps": 1e-8}}, {"training": {"lr": 0.2, "eps": 1e-8}}
    assert run.claim(experiment, mine, allow=()) == []
    assert run.belongs_to(mine) and not run.belongs_to(other)
    assert run.claim(experiment, other, allow=()) == []  # nothing was trained yet
    assert run.identity == other
    assert run.claim(experiment, mine, allow=()) == []
    run.append_metrics({"step": 1, "loss": 2.0})
    with pytest.raises(IdentityError, match=r"training\.lr 0\.1 -> 0\.2\n.*--allow supersede"):
        run.claim(experiment, other, allow=())
    assert run.claim(experiment, other, allow={"supersede"}) == ["training.lr 0.1 -> 0.2"]
    assert run.belongs_to(other)
    assert RunFolder(run.path.with_name("v1.superseded-1")).identity == mine


def test_one_holder_of_the_lock_at_a_time(run: RunFolder):
    with run.lock(), pytest.raises(BusyError, match="already training"), run.lock():
        pass
    with run.lock():
        pass
