"""Run the trainer on this machine: a torchrun child that dies with its parent, watched through the run folder.

What happens is read from files (`metrics.jsonl`, checkpoints, `outcome.json`), so a watcher that starts late or again
sees the same.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from openlm_pipeline.errors import TrainingError
from openlm_pipeline.experiments import Experiment
from openlm_pipeline.layout import Home
from openlm_pipeline.runs.checkpoints import Checkpoint, list_checkpoints
from openlm_pipeline.runs.folder import RunFolder, is_measurement

_POLL_SECONDS = 0.5
_GRACE_SECONDS = 300
"""For the trainer to end its step and save; its caller may lose patience earlier."""
_SIGNALS = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"
"""What torchrun passes on to its workers; by default SIGUSR1, with which SLURM warns, would kill it."""
_LOG = "train.log"
MALLOC_ENVIRONMENT = {
    # On a CPU glibc gives each large tensor's memory back to the kernel and gets it zeroed again a moment later.
    "MALLOC_MMAP_THRESHOLD_": str(1 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 32),
}


@dataclass(frozen=True)
class Progress:
    """A new record of `metrics.jsonl` with a loss."""

    record: dict[str, Any]


@dataclass(frozen=True)
class StepSkipped:
    """A record of `metrics.jsonl` of a step that was left out: `skipped` says why."""

    record: dict[str, Any]


@dataclass(frozen=True)
class MilestoneReached:
    """A milestone's checkpoint is complete on disk."""

    label: str
    checkpoint: Checkpoint


@dataclass(frozen=True)
class MilestoneReused(MilestoneReached):
    """A milestone that was there before training began."""


Event = Progress | StepSkipped | MilestoneReached


def milestone_checkpoints(experiment: Experiment, run: RunFolder) -> dict[str, Checkpoint]:
    """The complete milestones of a run by label, those of the experiment only."""
    if not (run.path / "run.json").exists():
        return {}
    wanted = dict(experiment.labelled_milestones())
    found = list_checkpoints(run.checkpoints, run.fingerprint, warn=lambda _: None)
    return {c.milestone: c for c in found if c.milestone in wanted}


def _stop(process: subprocess.Popen) -> None:
    """SIGTERM, time to save a checkpoint, then SIGKILL; the workers die with torchrun."""
    with suppress(ProcessLookupError):
        process.send_signal(signal.SIGTERM)
    try:
        process.wait(_GRACE_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def train_locally(experiment: Experiment, home: Home, run: RunFolder, until: int) -> Iterator[Event]:
    """Train up to `until` tokens with torchrun; yields metrics and milestones as they come.

    Closing the iterator, or an exception in the caller, stops the trainer, which first saves a checkpoint.

    Raises:
        TrainingError: the trainer ended before `until`; the message holds its own reason, or the end of its log.
    """
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone",
        f"--nproc-per-node={experiment.launcher.processes}", f"--max-restarts={experiment.launcher.max_restarts}",
        f"--signals-to-handle={_SIGNALS}", f"--shutdown-timeout={_GRACE_SECONDS}", "-m", "train",
        str(run.experiment_file), f"--until={until}",
    ]  # fmt: skip
    if setpriv := shutil.which("setpriv"):
        command = [setpriv, "--pdeathsig", "TERM", "--", *command]
    environment = {"OMP_NUM_THREADS": "1", **MALLOC_ENVIRONMENT, **os.environ, "OPENLM_HOME": str(home.root)}
    run.clear_outcome()
    log_path = run.path / _LOG
    metrics_offset = run.metrics_file.stat().st_size if run.metrics_file.exists() else 0
    seen_milestones = set(milestone_checkpoints(experiment, run))
    with log_path.open("ab") as log:
        # In a session of its own, so that Ctrl-C reaches this process only, which then stops the trainer in order.
        process = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
        try:
            ended = False
            while not ended:
                ended = process.poll() is not None  # read once more after the end, so that nothing is missed
                records, metrics_offset = run.new_metrics(metrics_offset)
                for record in records:
                    yield Progress(record) if is_measurement(record) else StepSkipped(record)
                for label, checkpoint in milestone_checkpoints(experiment, run).items():
                    if label not in seen_milestones:
                        seen_milestones.add(label)
                        yield MilestoneReached(label, checkpoint)
                if not ended:
                    time.sleep(_POLL_SECONDS)
        finally:
            if process.poll() is None:
                _stop(process)
    outcome = run.read_outcome()
    if outcome is None or outcome["status"] != "completed":
        tail = "\n".join(log_path.read_text(errors="replace").splitlines()[-15:])
        reason = outcome.get("reason", outcome["status"]) if outcome else f"exit code {process.returncode}"
        raise TrainingError(f"training of {experiment.name} ended early: {reason}\nThe end of {log_path}:\n{tail}")
