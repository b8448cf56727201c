"""A user's session works from end to end: see `journey.py`."""

import shlex
from pathlib import Path

import pytest
from commands import openlm
from gloo_workers import forked_trainers
from journey import prepare, session


@pytest.mark.parametrize("layout", ["huggingface", "llama"])
def test_a_users_session(layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    variables = prepare(tmp_path)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)

    def run(line: str) -> str:
        ended = openlm(*shlex.split(line), variables=variables)
        assert ended.returncode == 0, f"openlm {line}\n{ended.stdout}{ended.stderr}"
        return ended.stdout

    with forked_trainers():
        session(run, tmp_path, layout)
