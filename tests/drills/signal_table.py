"""What is signalled in the table of kills: each process of each stage, at a moment that a seed draws.

A command is started, one of its processes gets a signal while it is in work, and the same command is started again,
until it has had all of its signals; then it is let end. What it made must be what an undisturbed one makes.
"""

from __future__ import annotations

import contextlib
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from drill_pipeline import DrillPipeline, kill, wait_until
from gloo_workers import Forked, forked_program, forked_torchrun, ranks_of
from tiny_pipeline import REPOSITORY, environment

from openlm_pipeline.storage.files import sha256_file

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGKILL, signal.SIGSTOP)
STOPPED_SECONDS = 1.5
"""How long SIGSTOP lasts; then SIGCONT."""
PATIENCE_SECONDS = 300


Start = Callable[[DrillPipeline, Path], Any]


def forked(module: str, *arguments: str, **more: str) -> Start:
    """`python -m MODULE ARGUMENTS` with more variables, without the seconds that its imports take."""

    def start(pipeline: DrillPipeline, log: Path) -> Forked:
        words = [word.format(home=pipeline.home) for word in arguments]
        variables = {name: value.format(home=pipeline.home) for name, value in more.items()}
        return forked_program(module, *words, variables=environment(pipeline) | variables, log=log)

    return start


@dataclass
class WithCluster:
    """A command beside the scheduler and the worker of Dask that it joins, which end with it."""

    command: Forked
    scheduler: Forked
    worker: Forked

    @property
    def pid(self) -> int:
        return self.command.pid

    def poll(self) -> int | None:
        return self.command.poll()

    def wait(self, timeout: float) -> int:
        code = self.command.wait(timeout)
        for service in (self.worker, self.scheduler):
            service.kill()
            service.wait(60)
        return code


def with_cluster(*arguments: str) -> Start:
    """`openlm ARGUMENTS --dask-address ...`."""

    def start(pipeline: DrillPipeline, log: Path) -> WithCluster:
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = probe.getsockname()[1]
        address, beside = f"tcp://127.0.0.1:{port}", log.with_suffix(".dask")
        there = ("--host", "127.0.0.1", "--no-dashboard")

        def service(module: str, *words: str) -> Forked:
            return forked_program(module, *words, variables=environment(pipeline), log=beside)

        scheduler = service("distributed.cli.dask_scheduler", "--port", str(port), *there)
        worker = service("distributed.cli.dask_worker", address, "--no-nanny", "--nthreads", "1", *there)
        command = forked("openlm_pipeline", *arguments, "--dask-address", address)(pipeline, log)
        return WithCluster(command, scheduler, worker)

    return start


def started(module: str, *arguments: str) -> Start:
    """`python -m MODULE ARGUMENTS`, as people start it."""

    def start(pipeline: DrillPipeline, log: Path) -> psutil.Popen:
        with log.open("ab") as output:
            return psutil.Popen(
                [sys.executable, "-m", module, *arguments], cwd=REPOSITORY, env=environment(pipeline),
                stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip

    return start


def torchrun(*flags: str) -> Start:
    """torchrun with two ranks of a run."""

    def start(pipeline: DrillPipeline, log: Path) -> Forked:
        line = ("--standalone", "--nproc-per-node=2", "-m", "train", "tiny", *flags)
        return forked_torchrun(*line, variables={**environment(pipeline), "OMP_NUM_THREADS": "1"}, log=log)

    return start


Victims = Callable[[Any], list[psutil.Process]]


def itself(command: Any) -> list[psutil.Process]:
    """The command, once it has begun: it catches SIGTERM."""
    status = Path(f"/proc/{command.pid}/status")
    caught = int(status.read_text().partition("SigCgt:")[2].split()[0], 16) if status.exists() else 0
    return [psutil.Process(command.pid)] if caught >> signal.SIGTERM - 1 & 1 else []


def scheduler(command: WithCluster) -> list[psutil.Process]:
    return [command.scheduler]


def below(*words: str, without: str = "setpriv") -> Victims:
    """Its descendants that have all these words on their command line, and not another."""

    def victims(command: Any) -> list[psutil.Process]:
        found = []
        for process in command.children(recursive=True):
            with contextlib.suppress(psutil.Error):
                line = " ".join(process.cmdline())
                if all(word in line for word in words) and without not in line:
                    found.append(process)
        return found

    return victims


def ranks(command: Any) -> list[psutil.Process]:
    found = ranks_of(command)
    return list(found.values()) if len(found) == 2 else []


@dataclass(frozen=True)
class Case:
    """A process of a stage."""

    name: str
    start: Start
    victims: Victims
    makes: tuple[str, ...]
    """Folders of the home that the stage makes, which are removed to have it begin anew."""
    times: int = 1
    """It gets each signal so often for each seed."""
    named: bool = True
    """What it prints is ours: an error is one line."""


_SAME = (".md", ".csv", ".safetensors", ".distcp", ".tar", ".sums")
"""Files that are the same wherever and whenever they are made."""


def contents(pipeline: DrillPipeline, case: Case) -> dict[str, Any]:
    """What the stage made, less times and paths."""
    made = pipeline.results()
    parts = {
        "tokenized": ("shards",),
        "runs": ("weights and optimizer",),
        "scorecards": ("items", "scorecards"),
    }
    found = {part: made[part] for folder in case.makes for part in parts.get(folder, ())}
    for folder in {"reports", "exported", "bucket", "published"} & set(case.makes):
        files = sorted(p for p in (pipeline.home / folder).rglob("*") if p.suffix in _SAME)
        if folder == "bucket":  # others are where it was stopped
            milestones = {checkpoint.path.name for checkpoint in pipeline.checkpoints() if checkpoint.milestone}
            files = [path for path in files if path.parent.name in milestones]
        found[folder] = {str(p.relative_to(pipeline.home)): sha256_file(p) for p in files}
    return found


@dataclass
class Tally:
    """Signals that met a process in work."""

    valid: Counter[str] = field(default_factory=Counter)
    equal: int = 0
    seconds: float = 0.0
    wrong: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        kinds = ", ".join(f"{count} {name}" for name, count in sorted(self.valid.items()))
        return f"{self.valid.total()} valid ({kinds}), {self.equal} byte-equal, {self.seconds:.0f} s"


def _judged(number: int, code: int, on_itself: bool, said: str, case: Case) -> str | None:
    """What is wrong with how a command ended after a signal."""
    if number == signal.SIGSTOP:
        return None if code == 0 else f"exit code {code} after SIGSTOP and SIGCONT"
    if on_itself and number == signal.SIGKILL:
        return None if code == -signal.SIGKILL else f"exit code {code} after SIGKILL"
    if not case.named:
        return None
    if "Traceback" in said:
        return "a traceback"
    if code == 0:
        return None
    if on_itself and code == -number:  # at its end, when Python has let go of its handlers
        return None if "Traceback" not in said else "a traceback"
    if on_itself:
        return None if code in (130, 143) and "stopped" in said.splitlines()[-1] else f"exit code {code}"
    return None if code > 0 and re.search(r"^error: ", said, re.M) else f"exit code {code}"


def _lives(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    return False


class Drill:
    """The signals of a case on one pipeline."""

    def __init__(self, case: Case, undisturbed: DrillPipeline, folder: Path, seed: str) -> None:
        self.case, self.folder = case, folder
        self.rng = random.Random(f"{seed} {case.name}")
        self.pipeline = undisturbed.copy(folder / "pipeline")
        self._make_short()
        self.tally = Tally()
        self._pending = 0
        self._starts = 0
        self._expected: dict[str, Any] | None = None
        self._life = 1.0

    def _make_short(self) -> None:
        """Leave seconds of work, as there are many kills."""
        if "shards" in self.case.makes:
            for path in sorted((self.pipeline.home / "raw" / "tiny_text").iterdir())[2:]:
                path.unlink()
            shutil.rmtree(self.pipeline.home / "tokenizers")  # it was trained on all
        if "runs" in self.case.makes:
            recipe = self.pipeline.root / "recipes" / "tiny.yaml"
            text = recipe.read_text().replace("[8K, 24K]", "[2K, 4K]")
            recipe.write_text(text.replace("checkpoint_every: 3200", "checkpoint_every: 960"))

    def _clear(self) -> None:
        for name in self.case.makes:
            shutil.rmtree(self.pipeline.home / name, ignore_errors=True)

    def _start(self) -> tuple[Any, Path]:
        self._starts += 1
        log = self.folder / f"{self._starts}.log"
        log.touch()
        return self.case.start(self.pipeline, log), log

    def _victim(self, command: Any) -> psutil.Process | None:
        """One of those to be signalled, once it is there; None where the command ended before."""
        end = time.monotonic() + PATIENCE_SECONDS
        while time.monotonic() < end and command.poll() is None:
            with contextlib.suppress(psutil.NoSuchProcess):
                if found := self.case.victims(command):
                    return self.rng.choice(sorted(found, key=lambda process: process.pid))
            time.sleep(0.01)
        return None

    def _ended_well(self, code: int, log: Path) -> None:
        """Compare what was made, and begin anew."""
        assert code == 0, f"{self.case.name}: exit code {code}: {log.read_text()[-3000:]}"
        made = contents(self.pipeline, self.case)
        if self._expected is None:
            self._expected = made
        other = [part for part, value in self._expected.items() if made[part] != value]
        if other:
            self.tally.wrong.append(f"{self.case.name}: other {', '.join(other)} after {self._pending} signals")
        else:
            self.tally.equal += self._pending
        self._pending = 0
        self._clear()

    def run(self) -> Tally:
        began = time.monotonic()
        self._clear()
        command, log = self._start()
        assert self._victim(command), log.read_text()
        appeared = time.monotonic()
        code = command.wait(timeout=PATIENCE_SECONDS)
        self._life = time.monotonic() - appeared
        self._ended_well(code, log)
        queue = list(SIGNALS) * self.case.times
        self.rng.shuffle(queue)
        for _ in range(4 * len(queue)):
            if not queue:
                break
            if self._signal(queue[-1]):
                queue.pop()
        command, log = self._start()
        self._ended_well(command.wait(timeout=PATIENCE_SECONDS), log)
        self.tally.seconds = time.monotonic() - began
        return self.tally

    def _signal(self, number: int) -> bool:
        """Send a signal at a moment of the command's life; whether the victim was in work then."""
        command, log = self._start()
        victim = self._victim(command)
        if victim:
            time.sleep(self.rng.uniform(0, self._life))
        family: list[psutil.Process] = []
        in_work = False
        with contextlib.suppress(psutil.NoSuchProcess):
            if victim and command.poll() is None and _lives(victim):
                family = psutil.Process(command.pid).children(recursive=True)
                victim.send_signal(number)
                in_work = True
                if number == signal.SIGSTOP:
                    time.sleep(STOPPED_SECONDS)
                    victim.send_signal(signal.SIGCONT)
        try:
            code = command.wait(timeout=PATIENCE_SECONDS)
        except subprocess.TimeoutExpired:
            self.tally.wrong.append(f"{self.case.name}: hangs after {signal.Signals(number).name}")
            kill(*family, psutil.Process(command.pid))
            code = command.wait(timeout=60)
        if victim and victim.pid == command.pid and number == signal.SIGKILL and code == 0:
            in_work = False  # it had ended
        if in_work:
            wait_until(lambda: not any(map(_lives, family)), "its processes to go", seconds=60)
            self._pending += 1
            self.tally.valid[signal.Signals(number).name] += 1
            if problem := _judged(number, code, victim.pid == command.pid, log.read_text(), self.case):
                said = log.read_text()[-1500:]
                self.tally.wrong.append(f"{self.case.name}, {signal.Signals(number).name}: {problem}: {said}")
        if code == 0 and self._is_done():
            self._ended_well(code, log)
        return in_work

    def _is_done(self) -> bool:
        """Whether a command that ended well made all; a trainer that was asked to stop ends well, too."""
        return "runs" not in self.case.makes or (self.pipeline.run.read_outcome() or {}).get("status") == "completed"


_WORKERS, _RANKS = below("spawn_main"), below("programs.py train", without="torch.distributed.run")
CASES = (
    Case(
        "tokenize", forked("openlm_pipeline", "tokenize", "tiny", "--workers", "1"), itself, ("tokenized", "shards"), 3
    ),
    Case(
        "tokenize on Dask",
        forked("openlm_pipeline", "tokenize", "tiny", "--workers", "2"),
        lambda command: itself(command) if _WORKERS(command) else [],
        ("tokenized", "shards"),
    ),
    Case(
        "Dask worker",
        forked("openlm_pipeline", "tokenize", "tiny", "--workers", "2"),
        _WORKERS,
        ("tokenized", "shards"),
    ),
    Case(
        "tokenize through a store",
        forked(
            "openlm_pipeline",
            "tokenize",
            "tiny",
            "execution.shards_url=file://{home}/published",
            "--workers",
            "1",
            OPENLM_EXCHANGE="file://{home}/exchange",
        ),
        itself,
        ("tokenized", "shards", "published", "exchange"),
        3,
    ),
    Case("Dask scheduler", with_cluster("tokenize", "tiny"), scheduler, ("tokenized", "shards")),
    Case("torchrun", torchrun(), lambda command: itself(command) if ranks(command) else [], ("runs",), 3, named=False),
    Case("rank", torchrun(), ranks, ("runs",), 3, named=False),
    Case(
        "trainer that uploads",
        forked("train", "tiny", "execution.upload_to=file://{home}/bucket"),
        itself,
        ("runs", "bucket"),
        3,
        named=False,
    ),
    Case(
        "openlm train",
        started("openlm_pipeline", "train", "tiny"),
        lambda command: itself(command) if _RANKS(command) else [],
        ("runs",),
    ),
    Case("evaluate", forked("openlm_pipeline", "evaluate", "tiny"), itself, ("scorecards",), 3),
    Case(
        "scorer",
        forked("openlm_pipeline", "evaluate", "tiny", "evaluation.processes=2"),
        below("openlm_pipeline evaluate", without="torch.distributed.run"),
        ("scorecards",),
        named=False,  # what torchrun prints of it stands before our line
    ),
    Case("report", forked("openlm_pipeline", "report", "tiny"), itself, ("reports",), 2),
    Case(
        "export",
        forked(
            "openlm_pipeline",
            "export",
            "{home}/runs/tiny/v1/checkpoints/step-00000375",
            "-o",
            "{home}/exported",
            "--tokenizer",
            "{home}/tokenizers/tiny_bpe",
        ),
        itself,
        ("exported",),
        2,
    ),
    Case(
        "Dagster run",
        started("orchestration", "tokenize_tiny_text"),
        lambda command: itself(command) if _WORKERS(command) else [],
        ("tokenized", "shards"),
    ),
)
