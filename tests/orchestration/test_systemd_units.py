"""The units of a single machine, as far as they run without systemd."""

import configparser
import os
import shlex
import shutil
import sqlite3
import subprocess
import sys
from contextlib import closing
from importlib.metadata import entry_points
from pathlib import Path

import pytest
from tiny_pipeline import REPOSITORY, TinyPipeline, environment

PREFIX = "/opt/openlm_pipeline/.venv/bin/"
UNITS = {path.stem: path for path in (REPOSITORY / "deploy" / "systemd").glob("*.service")}


def _unit(name: str) -> configparser.ConfigParser:
    unit = configparser.ConfigParser(interpolation=None)
    unit.optionxform = str
    unit.read(UNITS[name])
    return unit


def _command(line: str) -> list[str]:
    """A unit's command, with this environment's programs."""
    program, *arguments = shlex.split(line)
    assert program.startswith(PREFIX)
    return [str(Path(sys.executable).parent / program.removeprefix(PREFIX)), *arguments]


def test_an_empty_home_is_filled_before_either_program_starts(tmp_path):
    pipeline = TinyPipeline.create(tmp_path / "pipeline")
    home = pipeline.root / "dagster"
    command = _command(_unit("openlm-webserver")["Service"]["ExecStartPre"])
    subprocess.run(command, cwd=REPOSITORY, env=environment(pipeline), check=True)
    for name in ("history/runs.db", "history/runs/index.db", "schedules/schedules.db"):
        with closing(sqlite3.connect(home / name)) as connection:
            assert len(connection.execute("SELECT version_num FROM alembic_version").fetchall()) == 1, name
    # A unit is up for those after it when its ExecStartPre has ended and its ExecStart has begun.
    assert "openlm-webserver.service" in _unit("openlm-daemon")["Unit"]["After"].split()


@pytest.mark.parametrize("name", sorted(UNITS))
def test_a_unit_names_a_program_that_is_installed_and_knows_its_arguments(name, monkeypatch):
    program, *arguments = _command(_unit(name)["Service"]["ExecStart"])
    assert os.access(program, os.X_OK)
    (script,) = entry_points(group="console_scripts", name=Path(program).name)
    monkeypatch.setattr(sys, "argv", [program, *arguments, "--help"])
    with pytest.raises(SystemExit) as ended:
        script.load()()
    assert ended.value.code == 0


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="there is no systemd-analyze")
def test_systemd_finds_nothing_wrong(tmp_path):
    for path in UNITS.values():  # the programs it looks for are here
        text = path.read_text().replace(PREFIX, f"{Path(sys.executable).parent}/").replace("User=openlm", "User=root")
        (tmp_path / path.name).write_text(text)
    command = ["systemd-analyze", "verify", *(str(tmp_path / path.name) for path in UNITS.values())]
    checked = subprocess.run(command, capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stderr
    assert ".service" not in checked.stderr
