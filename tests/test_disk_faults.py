"""A home that is full or read-only: each command says so in one line, and those that only look still answer."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from commands import openlm
from tiny_pipeline import TinyPipeline

LOOKS = ["plan tiny", "runs", "show tiny", "cost tiny", "logs tiny", "gc", "stop tiny", "recipes", "env"]
WRITES = ["tokenize tiny version=v2", "train tiny version=v2", "report tiny", "gc --apply", "launch tiny"]


@pytest.fixture
def disk(tmp_path) -> Iterator[Path]:
    """A file system of 24 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(folder)], capture_output=True, text=True
    )
    if made.returncode:
        pytest.skip(f"a file system can't be mounted here: {made.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def said(command: str, pipeline: TinyPipeline, home: Path):
    variables = {**pipeline.variables, "OPENLM_HOME": str(home), "DAGSTER_HOME": str(home / "dagster")}
    return openlm(*command.split(), variables=variables)


def test_a_read_only_home_is_looked_at_and_not_written_to(finished, tmp_path, disk):
    pipeline = finished.copy(tmp_path / "pipeline")
    shutil.copytree(pipeline.home, disk / "home")
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    for command in LOOKS:
        result = said(command, pipeline, disk / "home")
        assert result.returncode == 0, f"{command}: {result.stderr}"
    for command in WRITES:
        result = said(command, pipeline, disk / "home")
        assert result.returncode == 1 and "Read-only file system" in result.stderr, f"{command}: {result.stderr}"
        assert result.stderr.startswith("error: ") and len(result.stderr.splitlines()) == 1, command


def test_a_full_disk_is_named_and_the_same_command_goes_on(finished, tmp_path, disk):
    pipeline = finished.copy(tmp_path / "pipeline")
    shutil.copytree(pipeline.home, disk / "home", ignore=shutil.ignore_patterns("shards", "tokenized"))
    free = os.statvfs(disk)
    (disk / "filler").write_bytes(bytes(free.f_bavail * free.f_frsize - 20_000))
    result = said("tokenize tiny --workers 1", pipeline, disk / "home")
    assert result.returncode == 1 and "No space left on device" in result.stderr, result.stderr
    assert len(result.stderr.splitlines()) == 1
    (disk / "filler").unlink()
    assert said("tokenize tiny --workers 1", pipeline, disk / "home").returncode == 0
