"""What a run's time went into, and the commands that say it: from real runs, one of them killed and resumed."""

import json
import subprocess
import sys
import time

import psutil
import pytest
from small_run import SmallRun
from tiny_pipeline import TinyPipeline, environment
from typer.testing import CliRunner
from waiting import wait_until

from openlm_pipeline.cli.main import app
from openlm_pipeline.runs import ledger
from openlm_pipeline.runs.folder import RunFolder

KINDS = ("productive", "lost", "start", "save", "other", "idle")


def said(*arguments: str) -> str:
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_the_kinds_of_time_add_up_and_milestones_share_them(tmp_path):
    small = SmallRun(tmp_path, (2, 4))
    small.train()
    of = ledger.facts(small.run)
    assert sum(of[f"{kind}_seconds"] for kind in KINDS) == pytest.approx(of["wall_seconds"], abs=0.01)
    assert of["productive_seconds"] > 0 and of["start_seconds"] > 0 and of["lost_seconds"] == of["idle_seconds"] == 0
    assert 0 < of["goodput"] < 1
    parts = [ledger.facts(small.run, c.milestone) for c in small.run.saved() if c.milestone]
    assert len(parts) == 2
    assert sum(p["gpu_hours"] for p in parts) == pytest.approx(of["gpu_hours"], abs=1e-5)


def test_a_second_session_has_idle_time_before_it(tmp_path):
    small = SmallRun(tmp_path, (2, 4))
    small.train("milestones=[512]")
    time.sleep(1.0)
    small.train()
    of, made = ledger.facts(small.run), ledger.History(small.run).account()
    assert of["idle_seconds"] >= 1.0
    assert [session["end"]["status"] for session in made.sessions] == ["completed", "completed"]
    assert of["gpu_hours"] == pytest.approx((of["wall_seconds"] - of["idle_seconds"]) / 3600, abs=1e-5)


def test_steps_trained_again_after_a_kill_are_lost(tmp_path, monkeypatch):
    """As if killed after its last record: the ledger has no end, and the newest checkpoint is gone with it."""
    small = SmallRun(tmp_path, (2, 6))
    small.train()
    lines = small.run.ledger_file.read_text().splitlines(keepends=True)
    small.run.ledger_file.write_text("".join(line for line in lines if json.loads(line)["event"] != "end"))
    (last,) = [c.path for c in small.run.saved() if c.step == 6]
    last.rename(tmp_path / "gone")
    before = ledger.facts(small.run)
    small.train()
    of, made = ledger.facts(small.run), ledger.History(small.run).account()
    assert before["lost_seconds"] == 0 < of["lost_seconds"]
    assert made.sessions[0]["end"] is None and made.sessions[1]["end"]["status"] == "completed"
    (killed,) = made.interruptions
    assert (killed["how"], killed["step"], killed["lost_seconds"]) == ("killed", 6, of["lost_seconds"])
    assert killed["idle_seconds"] == of["idle_seconds"] and killed["start_seconds"] > 0
    monkeypatch.setenv("OPENLM_HOME", str(small.home.root))
    assert "after step 6: killed, which cost lost " in said("cost", "small")
    assert of["productive_seconds"] > of["lost_seconds"] * 0.3


def test_of_a_run_without_a_ledger_only_steps_count(tmp_path):
    small = SmallRun(tmp_path, (2, 4))
    small.train()
    for name in ("ledger.jsonl", "outcome.json"):
        (small.run.path / name).unlink()
    of = ledger.facts(small.run)
    assert of["productive_seconds"] > 0 and "goodput" not in of
    assert "without a ledger" in ledger.sentence(of)


@pytest.fixture
def home(finished, tmp_path, monkeypatch) -> TinyPipeline:
    pipeline = finished.copy(tmp_path / "pipeline")
    for name, value in pipeline.variables.items():
        monkeypatch.setenv(name, value)
    return pipeline


def test_runs_show_cost_logs_and_stop_of_a_finished_run(home):
    (row,) = json.loads(said("runs", "--json"))
    assert (row["run"], row["state"], row["target_tokens"], row["milestone"]) == ("tiny", "completed", 40_000, "t0040K")
    assert 0 < row["score"]["value"] < 1 and row["loss"] > 0
    shown = said("show", "tiny")
    for part in ("tiny v1", "tiny_text", "t0040K", "loss", "all_tasks"):
        assert part in shown, part
    shown = said("show", "tiny@40K")
    for part in ("tiny v1 at 40.192K tokens", "step        157", "last_word/0-shot", "all_tasks"):
        assert part in shown, part
    costs = json.loads(said("cost", "tiny", "--price", "2", "--json"))
    assert set(costs["runs"]) == {"tiny/v1", "tiny/v1@t0010K", "tiny/v1@t0040K"}
    assert "money" in said("cost", "tiny", "--price", "2")
    assert "tokens/s" in said("logs", "tiny", "-n", "20")
    assert "tiny is not running: completed" in said("stop", "tiny")


def test_an_unknown_run_names_the_nearest_and_a_damaged_one_is_a_row(home):
    for command in ("show", "cost", "logs", "stop"):
        result = CliRunner().invoke(app, [command, "tinny"])
        assert "did you mean 'tiny'?" in str(result.exception), command
    (home.run_folder / "run.json").write_text("{")
    assert [row["state"] for row in json.loads(said("runs", "--json"))] == ["damaged"]
    assert "damaged" in said("runs")


def test_env_names_secrets_and_tells_none(home, monkeypatch):
    monkeypatch.setenv("OPENLM_ALERT_WEBHOOK", "https://hooks.example/secret")
    text = said("env")
    assert "torch" in text and "OPENLM_ALERT_WEBHOOK" in text and "hooks.example" not in text
    assert json.loads(said("env", "--json"))
    assert "openlm 0." in said("--version")


def test_stop_saves_a_run_that_another_process_trains_and_it_goes_on(home):
    """The command that trains ends in one line; the checkpoint is that of the step where it stopped."""
    recipe = home.root / "recipes" / "tiny.yaml"
    recipe.write_text(recipe.read_text().replace("[10K, 40K]", "[10K, 40K, 20M]"))
    command = [sys.executable, "-m", "openlm_pipeline", "train", "tiny", "--allow", "repeat_data"]
    run = RunFolder(home.run_folder)
    size = run.metrics_file.stat().st_size
    with subprocess.Popen(
        command, env=environment(home), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        wait_until(lambda: run.metrics_file.stat().st_size > size, process, seconds=120)
        assert json.loads(said("runs", "--json"))[0]["state"] == "running"
        said("stop", "tiny")
        out, err = process.communicate(timeout=120)
    assert process.returncode == 6 and "Traceback" not in err, err
    (row,) = json.loads(said("runs", "--json"))
    assert row["state"] == "preempted" and run.saved()[-1].tokens > 40_000


def test_a_trainer_that_does_not_hear_is_killed_where_that_is_asked(home):
    recipe = home.root / "recipes" / "tiny.yaml"
    longer = recipe.read_text().replace("[10K, 40K]", "[10K, 40K, 20M]")
    recipe.write_text(longer.replace("{processes: 1}", "{processes: 1, grace_seconds: 2}"))
    command = [sys.executable, "-m", "openlm_pipeline", "train", "tiny", "--allow", "repeat_data"]
    run = RunFolder(home.run_folder)
    size = run.metrics_file.stat().st_size
    process = subprocess.Popen(command, env=environment(home), stderr=subprocess.PIPE, text=True)
    try:
        wait_until(lambda: run.metrics_file.stat().st_size > size, process, seconds=120)
        _, pid, _ = next(event["process"] for event in reversed(run.read_ledger()) if "process" in event)
        psutil.Process(pid).suspend()
        result = CliRunner().invoke(app, ["stop", "tiny"])
        assert f"process {pid} is still there after 2 s" in str(result.exception)
        assert "openlm stop tiny --kill" in str(result.exception)
        assert "and is killed" in said("stop", "tiny", "--kill")
        _, err = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 6 and "Traceback" not in err, err
    assert "was asked to stop; the same command resumes it" in err


def test_what_is_read_as_it_is_written_is_what_is_read_at_once(tmp_path, monkeypatch):
    """A run that was killed inside a line and went back, its files growing by pieces; spells are joined meanwhile."""
    small = SmallRun(tmp_path, (2, 6))
    small.train()
    (last,) = [c.path for c in small.run.saved() if c.step == 6]
    last.rename(tmp_path / "gone")
    with small.run.metrics_file.open("a") as f:
        f.write('{"step": 7, "lo')
    small.train()
    whole, facts, spells = ledger.facts(small.run), {}, {}
    metrics, events = small.run.metrics_file.read_bytes(), small.run.ledger_file.read_bytes().splitlines(keepends=True)
    (small.run.path / "outcome.json").unlink()
    for most in (10_000, 2):
        monkeypatch.setattr(ledger, "_MOST_SPELLS", most)
        small.run.metrics_file.write_bytes(b"")
        small.run.ledger_file.write_bytes(b"")
        history, written = ledger.History(small.run), 0
        for end in range(0, len(metrics) + 100, 97):
            small.run.metrics_file.write_bytes(metrics[:end])
            while written < len(events) and json.loads(events[written])["metrics_bytes"] <= end:
                written += 1
            small.run.ledger_file.write_bytes(b"".join(events[:written]))
            history.update()
        assert (written, history.losses.records()) == (len(events), small.run.read_metrics())
        assert history.account().sessions == ledger.History(small.run).account().sessions
        facts[most], spells[most] = history.facts(), len(history.account().spells)
    assert facts[10_000] == whole
    steps = [of["productive_seconds"] + of["lost_seconds"] for of in (facts[2], whole)]
    assert steps[0] == pytest.approx(steps[1], abs=0.01) and facts[2]["lost_seconds"] > 0
    assert spells[2] < spells[10_000]


def test_escapes_in_a_log_do_not_reach_the_terminal(home):
    log = home.run_folder / "train.log"
    log.write_bytes("\x1b]0;title\x07 \x1b[31mred\n日本\nlast".encode() + b"\xff\n")
    assert said("logs", "tiny", "-n", "3") == "\\x1b]0;title\\x07 \\x1b[31mred\n日本\nlast\ufffd\n"
