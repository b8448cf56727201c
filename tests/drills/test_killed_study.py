"""`openlm study run`, killed: its steps end, and the same command again makes what it would have made."""

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from study_pipeline import study_pipeline
from tiny_pipeline import REPOSITORY, TinyPipeline
from waiting import wait_until

from openlm_pipeline.runs.folder import RunFolder

pytestmark = pytest.mark.drill
RUNS = ("sizes_d8_l1_h2", "sizes_d16_l1_h2", "sizes_d24_l1_h2")


def start(pipeline: TinyPipeline, log: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "openlm_pipeline", "study", "run", "sizes", "--slots", "2"]
    environment = {**os.environ, **pipeline.variables, "PYTHONPATH": str(REPOSITORY)}
    with log.open("ab") as out:
        return subprocess.Popen(command, env=environment, cwd=pipeline.root, stdout=out, stderr=out)


def below(process: psutil.Process) -> list[psutil.Process]:
    return [process, *process.children(recursive=True)]


def running(process: psutil.Process, program: str) -> list[psutil.Process]:
    """Those below it that run a program of ours."""
    found = []
    for one in below(process):
        with contextlib.suppress(psutil.Error):
            if program in one.cmdline() and any(word.endswith("programs.py") for word in one.cmdline()):
                found.append(one)
    return found


def digests(pipeline: TinyPipeline) -> dict[str, list[str]]:
    saved = {name: RunFolder(pipeline.home / "runs" / name / "v1").saved() for name in RUNS}
    return {name: [c.weights_digest for c in of if c.milestone] for name, of in saved.items()}


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_study_goes_on(tmp_path: Path, sent: signal.Signals):
    whole, pipeline = study_pipeline(tmp_path / "whole"), study_pipeline(tmp_path / "killed")
    log = tmp_path / "log"
    assert start(whole, log).wait(400) == 0, log.read_text()[-3000:]
    for _ in range(2):
        command = start(pipeline, log)
        process = psutil.Process(command.pid)
        wait_until(lambda: running(process, "train"), command, seconds=200)  # noqa: B023
        of_it, (job,) = below(process), running(process, "orchestration")
        job.send_signal(sent)
        command.wait(200)
        _, alive = psutil.wait_procs(of_it, timeout=60)
        assert not [p for p in alive if p.status() != psutil.STATUS_ZOMBIE], log.read_text()[-3000:]
    assert start(pipeline, log).wait(400) == 0, log.read_text()[-3000:]
    assert digests(pipeline) == digests(whole)
    assert all(len(of) == 2 for of in digests(pipeline).values())
    fits = [(p.home / "studies" / "sizes" / "fit.json").read_bytes() for p in (whole, pipeline)]
    assert fits[0] == fits[1]
