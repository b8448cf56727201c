"""Every command that the README shows works: run where it is quick, else stopped at its missing input."""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
import typer
from commands import openlm

from openlm_pipeline.cli.main import app, with_repeated_options
from openlm_pipeline.experiments import load_experiment

ROOT = Path(__file__).parents[1]


def commands(page: str = "README.md") -> list[str]:
    """The lines of a page's code blocks that start with a program of ours."""
    blocks = (ROOT / page).read_text().split("```")[1::2]
    lines = [line.strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line.split(" ")[0] in ("openlm", "torchrun", "make", "dagster")]


def leaves(command: click.Command, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    """The commands of `openlm` that have none below them, by their words."""
    for name, below in getattr(command, "commands", {}).items():
        yield from leaves(below, (*path, name))
    if not hasattr(command, "commands"):
        yield path, command


COMMANDS = dict(leaves(typer.main.get_command(app)))


def examples() -> list[str]:
    """All that `--help` and the pages of docs/ show of `openlm`."""
    helps = [" ".join(part.split()) for command in COMMANDS.values() for part in (command.help or "").split("\n\n")]
    found = [m[1] for line in helps if (m := re.match(r"(?:Examples?: )?(?:[A-Z_]+=\S+ )*(openlm .*)", line))]
    pages = sorted(p.relative_to(ROOT) for p in (ROOT / "docs").glob("*.md") if "tutorial" not in p.name)
    return sorted({*found, *(line for page in pages for line in commands(page) if line.startswith("openlm "))})


RUN = ("plan", "runs", "show", "logs", "stop", "cost", "env", "report", "items", "compare", "gc", "baselines")
RUN = (*RUN, "shards", "export", "generate", "fork", "release", "trace", "verify")
"""Commands whose examples end at once where nothing was made yet; the others' are parsed."""
ANSWERS = (0, 3)
"""Exit codes of a command that did it, or named the input that is missing."""


@pytest.mark.parametrize("line", examples())
def test_examples_of_docs_and_help_are_right(line, tmp_path, monkeypatch):
    arguments = shlex.split(line.partition(" > ")[0], comments=True)[1:]
    words = tuple(arguments[: 1 + (arguments[0] in ("shards", "study"))])
    COMMANDS[words].make_context(" ".join(words), with_repeated_options(arguments[len(words) :]))
    if words[0] in RUN:
        monkeypatch.chdir(tmp_path)
        (tmp_path / "README.md").write_text("")
        result = openlm(*arguments, variables={**variables(tmp_path), "COLUMNS": "200"})
        assert result.returncode in ANSWERS and "Traceback" not in result.stderr, result.stderr


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
    of_runs = ("show", "cost", "generate", "release", "trace", "verify")
    missing = ("pretrain_", "/data/", *(["demo"] if arguments[0] in of_runs else []))
    needs_input = any(a.startswith(missing) for a in arguments) and "--dry-run" not in arguments
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
