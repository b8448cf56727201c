"""When LLM Foundry fails, the error says how and shows the end of its output; nothing is left behind."""

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from openlm_pipeline.errors import ConfigError, MissingInputError
from openlm_pipeline.evaluation.foundry import environment
from openlm_pipeline.evaluation.foundry.backend import score_suite_with_foundry
from openlm_pipeline.evaluation.foundry.environment import FoundryError, find_foundry_python, run_foundry
from openlm_pipeline.evaluation.suite import load_suite

CONTEXT = {"run": "demo", "run_version": "v1", "milestone": "t0250K", "step": 31, "tokens": 250_000}


@pytest.fixture
def score(tokenizer, home, demo_files, tmp_path):
    def run(python: Path, model_folder: Path = tmp_path, **changes):
        settings = {"tokenizer": tokenizer, "checkpoint_digest": "weights", "max_seq_len": 128} | changes
        suite = load_suite("demo")
        return score_suite_with_foundry(model_folder, suite, home, tmp_path / "out", CONTEXT, python=python, **settings)

    return run


def left_behind(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_model_that_does_not_load(score, foundry_python, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "no such architecture"}')
    with pytest.raises(FoundryError) as failed:
        score(foundry_python, folder)
    assert "LLM Foundry failed with code 1" in str(failed.value)
    assert "no such architecture" in str(failed.value)
    assert str(tmp_path / "out" / "foundry.log") in str(failed.value)
    assert left_behind(tmp_path / "out") == ["foundry.log"]


def test_an_interpreter_without_llm_foundry(score, tmp_path):
    with pytest.raises(FoundryError, match=r"(?s)failed with code 1.*No module named '(composer|torchvision)'"):
        score(Path(sys.executable))
    assert left_behind(tmp_path / "out") == ["foundry.log"]
    with pytest.raises(ConfigError, match="can't be started"):
        score(tmp_path / "nowhere" / "python")


def interpreter(path: Path, script: str) -> Path:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


def test_a_process_that_is_killed(score, tmp_path):
    with pytest.raises(FoundryError, match=r"(?s)ended by signal 9 \(.*memory.*ends with\nfar already"):
        score(interpreter(tmp_path / "python", "echo far already >&2; kill -9 $$"))
    assert left_behind(tmp_path / "out") == ["foundry.log"]


def test_leaving_ends_the_process(tmp_path):
    """As an interrupt does in the middle of a task."""
    python = interpreter(tmp_path / "python", """echo "{\\"pid\\": $$}"; exec sleep 1000""")
    said = run_foundry(python, {}, tmp_path, tmp_path / "log", 1)
    pid = next(said)["pid"]
    assert psutil.pid_exists(pid)
    said.close()
    assert not psutil.pid_exists(pid)


def test_it_dies_with_its_parent(foundry_python, tmp_path):
    """The script itself, which would wait for ever for its job, when its parent is killed."""
    os.mkfifo(tmp_path / "job.json")
    script = Path(environment.__file__).with_name("runner.py")
    command = [str(foundry_python), str(script), str(tmp_path / "job.json")]
    source = f"import subprocess; p = subprocess.Popen({command}, stdin=-1); print(p.pid, flush=True); p.wait()"
    with subprocess.Popen([sys.executable, "-c", source], stdout=subprocess.PIPE, text=True) as parent:
        child = psutil.Process(int(parent.stdout.readline()))
        parent.kill()
    try:
        psutil.wait_procs([child], timeout=60)
        assert not child.is_running()
    finally:
        if child.is_running():
            child.kill()


def test_where_the_interpreter_is(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("OPENLM_FOUNDRY_PYTHON", raising=False)
    with pytest.raises(MissingInputError, match="make foundry"):
        find_foundry_python()
    here = tmp_path / ".foundry" / "bin" / "python"
    here.parent.mkdir(parents=True)
    here.symlink_to(sys.executable)
    assert find_foundry_python() == here
    monkeypatch.setenv("OPENLM_FOUNDRY_PYTHON", sys.executable)
    assert find_foundry_python() == Path(sys.executable)
    monkeypatch.setenv("OPENLM_FOUNDRY_PYTHON", str(tmp_path / "other"))
    with pytest.raises(ConfigError, match="other, which does not exist"):
        find_foundry_python()
