"""The programs that measure training run on tiny models, say what they left out, and stop when they are asked to."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from small_run import REPOSITORY, SmallRun
from waiting import wait_until


def start(program: str, *arguments: object) -> subprocess.Popen:
    """A benchmark without a GPU."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, f"benchmarks/{program}.py", *map(str, arguments)]
    return subprocess.Popen(command, cwd=REPOSITORY, env=environment, text=True, stdout=subprocess.PIPE)


def lines(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


def test_the_gpu_benchmark_runs_each_switch_on_tiny_models(out: Path):
    with start("gpu", "--tiny", "--only", "1b", "7b", "--out", out) as process:
        printed, _ = process.communicate(timeout=300)
    assert process.returncode == 0
    found = lines(out)
    assert [line for line in printed.splitlines() if line.startswith("{")] == list(map(json.dumps, found))
    assert not [line for line in found if line["what"] == "failed"]
    needs_a_gpu = {"cudnn attention", "flash attention", "efficient attention", "expandable segments", "float8"}
    left_out = {line["switch"]: line["reason"] for line in found if line["what"] == "left out"}
    assert left_out.keys() <= needs_a_gpu
    assert left_out["cudnn attention"] == "attention can be chosen on a GPU alone"
    measured = {(line["model"], line["switch"]) for line in found if line["what"] == "speed"}
    assert {("1b", "base"), ("1b", "document mask"), ("1b", "muon"), ("7b", "larger micro-batch")} <= measured
    for line in (line for line in found if line["what"] == "speed"):
        assert line["tokens_per_second"] > 0 and line["top_kernels"] and line["estimate_gib"] > 0
    best = {line["model"]: line for line in found if line["what"] == "best"}
    assert best["1b"]["tokens_per_second"] == max(
        line["tokens_per_second"]
        for line in found
        if line["what"] == "speed" and line["model"] == "1b" and line["kept"]
    )
    assert "training.precision=bf16" in best["7b"]["overrides"]
    assert found[-1] == {"what": "end", "missed": []}
    assert "| 1b | base (kept) |" in (out / "results.md").read_text()
    assert (out / "results.png").read_bytes().startswith(b"\x89PNG")


def test_an_interrupted_gpu_benchmark_reports_what_it_has_and_names_the_rest(out: Path):
    with start("gpu", "--tiny", "--only", "1b", "--out", out) as process:
        wait_until(lambda: (out / "results.jsonl").exists() and len(lines(out)) > 1, process, seconds=300)
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=300)
    assert process.returncode == 0
    found = lines(out)
    assert found[1]["what"] == "speed"
    left_out = {line["switch"]: line["reason"] for line in found if line["what"] == "left out"}
    assert left_out["full checkpointing"] == "interrupted"
    assert "| 1b | base (kept) |" in (out / "results.md").read_text()


def test_what_the_time_does_not_allow_is_left_out(out: Path):
    with start("gpu", "--tiny", "--only", "411m", "--seconds", "0", "--out", out) as process:
        process.communicate(timeout=300)
    assert process.returncode == 0
    reasons = [(line["switch"], line["reason"]) for line in lines(out) if line["what"] == "left out"]
    assert ("base", "the time is up: --seconds 0") in reasons


def test_without_a_gpu_nothing_is_measured(out: Path):
    with start("gpu", "--out", out) as process:
        process.communicate(timeout=300)
    assert process.returncode == 1
    assert not out.exists()


def test_the_cpu_benchmark_measures_a_model_with_a_switch(tmp_path: Path):
    shards = SmallRun(tmp_path, (4,)).home.shards("text", "v1")
    arguments = ["--shards", shards, "--seq-len", 32, "--runs", 1, "--models", "open_lm_11m", "--switches", "bf16"]
    with start("train", *arguments) as process:
        printed, _ = process.communicate(timeout=300)
    assert process.returncode == 0
    rows = [line.split(" | ")[:2] for line in printed.splitlines() if line.startswith("| open_lm_11m")]
    assert rows == [["| open_lm_11m", "base"], ["| open_lm_11m", "bf16"]]
