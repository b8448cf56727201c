"""Every command that the README shows works: run where it is quick, else stopped at its missing input."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from commands import openlm

from openlm_pipeline.experiments import load_experiment

ROOT = Path(__file__).parents[1]


def commands() -> list[str]:
    """The lines of the README's code blocks that start with a program of ours."""
    blocks = (ROOT / "README.md").read_text().split("```")[1::2]
    lines = [line.strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line.split(" ")[0] in ("openlm", "torchrun", "make", "dagster")]


def variables(home: Path) -> dict[str, str]:
    return {"OPENLM_HOME": str(home), "OPENLM_RECIPES": str(home), "OPENLM_RAW_DATA": str(home / "none")}


def run(arguments: list[str], home: Path) -> subprocess.CompletedProcess:
    environment = {**os.environ, **variables(home), "COLUMNS": "200"}
    return subprocess.run(arguments, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


def test_the_readme_shows_the_main_commands():
    shown = {line.split(" ")[0] for line in commands()}
    assert {"openlm", "torchrun", "make", "dagster"} <= shown


@pytest.mark.parametrize("line", [c for c in commands() if c.startswith("openlm")])
def test_openlm_commands_work_or_name_the_missing_input(line, tmp_path, monkeypatch):
    arguments = shlex.split(line)[1:]
    monkeypatch.chdir(ROOT)
    result = openlm(*arguments, variables={**variables(tmp_path), "COLUMNS": "200"})
    needs_input = any(a.startswith(("pretrain_", "/data/")) for a in arguments) and "--dry-run" not in arguments
    assert result.returncode == (3 if needs_input else 0), result.stderr + result.stdout
    if needs_input:
        assert result.stderr.startswith("error: ")
        assert str(tmp_path) in result.stderr or "/data/" in result.stderr


@pytest.mark.parametrize("line", [c for c in commands() if c.startswith("torchrun")])
def test_torchrun_commands_name_a_recipe_and_valid_settings(line):
    words = shlex.split(line)
    recipe, *overrides = words[words.index("-m") + 2 :]
    assert load_experiment(recipe, overrides).name == recipe


@pytest.mark.parametrize("line", [c for c in commands() if c.startswith("make")])
def test_make_targets_exist(line, tmp_path):
    assert run(["make", "-n", *shlex.split(line)[1:]], tmp_path).returncode == 0


@pytest.mark.parametrize(
    "arguments", [["train", "no_such"], ["train", "demo", "training.lrr=1"], ["evaluate", "demo", "x"]]
)
def test_a_wrong_recipe_or_key_is_exit_code_2(arguments, tmp_path):
    result = openlm(*arguments, variables=variables(tmp_path))
    assert result.returncode == 2
    assert result.stderr.startswith("error: ")
    assert "Traceback" not in result.stderr


def test_the_program_ends_as_the_command_in_this_process(tmp_path):
    program = [sys.executable, "-m", "openlm_pipeline"]
    assert run([*program, "recipes"], tmp_path).returncode == 0
    refused = run([*program, "train", "no_such"], tmp_path)
    assert refused.returncode == 2
    assert refused.stderr.startswith("error: ")
    assert "Traceback" not in refused.stderr
