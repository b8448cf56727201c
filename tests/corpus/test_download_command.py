"""`openlm download` as a program of its own: killed, interrupted, out of room."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from threading import Event

import pytest
import typer
from faulty_server import DATA, Answer, serve
from typer.testing import CliRunner

from openlm_pipeline.cli.download import download

HELD_BYTES = 1 << 19
PROGRAM = """
import resource, sys
from openlm_pipeline.cli.main import main
limit, sys.argv[1] = int(sys.argv[1]), "download"
if limit:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
main()
"""


def start(*arguments: str, file_limit_bytes: int = 0) -> "subprocess.Popen[str]":
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", PROGRAM, str(file_limit_bytes), *arguments]
    return subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_download_asks_only_for_the_rest(sent: signal.Signals, tmp_path: Path) -> None:
    part, held = tmp_path / "a.jsonl.part", Event()
    with serve() as server:
        server.files["/a.jsonl"] = DATA
        server.answers["/a.jsonl"] = [Answer(cut_after=HELD_BYTES, hold=held)]
        arguments = (f"{server.url}/a.jsonl", "--output-dir", str(tmp_path), "--timeout", "1", "--retries", "0")
        with start(*arguments) as program:
            assert server.sent.wait(300)
            while not part.exists() or part.stat().st_size < HELD_BYTES:
                assert program.poll() is None
            program.send_signal(sent)
            output, _ = program.communicate(timeout=300)
        held.set()
        assert program.returncode == (-signal.SIGKILL if sent == signal.SIGKILL else 130)
        assert ("stopped; what is done stays done" in output) == (sent == signal.SIGINT)
        assert not (tmp_path / "a.jsonl").exists()
        with start(*arguments) as program:
            output, _ = program.communicate(timeout=300)
        assert program.returncode == 0 and "all 1 files are whole" in output, output
        assert server.ranges("/a.jsonl") == [None, f"bytes={HELD_BYTES}-"]
    assert (tmp_path / "a.jsonl").read_bytes() == DATA


def test_a_write_that_fails_keeps_the_part_and_says_so(tmp_path: Path) -> None:
    with serve() as server:
        server.files["/a.jsonl"] = DATA
        arguments = (f"{server.url}/a.jsonl", "--output-dir", str(tmp_path))
        with start(*arguments, file_limit_bytes=1_000_000) as program:
            output, _ = program.communicate(timeout=300)
        assert program.returncode and "can't be written: File too large. What was fetched is kept" in output
        kept = (tmp_path / "a.jsonl.part").stat().st_size
        assert 0 < kept <= 1_000_000 and not (tmp_path / "a.jsonl").exists()
        with start(*arguments) as program:
            program.communicate(timeout=300)
        assert server.ranges("/a.jsonl") == [None, f"bytes={kept}-"] and (tmp_path / "a.jsonl").read_bytes() == DATA


def test_help_teaches_and_a_dry_run_asks_nobody(tmp_path: Path) -> None:
    app = typer.Typer(rich_markup_mode=None)
    app.command()(download)
    shown = CliRunner().invoke(app, ["--help"]).output
    assert "Example: openlm download 'https://" in shown and "{00..29}" in shown
    (tmp_path / "00.jsonl").write_bytes(b"x" * 1000)
    (tmp_path / "01.jsonl.part").write_bytes(b"x" * 10)
    arguments = ["http://no-such-host.invalid/{00..02}.jsonl?key=secret", "-o", str(tmp_path), "--dry-run"]
    lines = CliRunner().invoke(app, arguments).output.splitlines()
    assert lines == [
        "00.jsonl  there, 1,000 bytes  http://no-such-host.invalid/00.jsonl",
        "01.jsonl  part, 10 bytes  http://no-such-host.invalid/01.jsonl",
        "02.jsonl  missing  http://no-such-host.invalid/02.jsonl",
    ]
