"""Train a run by its launcher, and tell what happens as it happens.

What happens is read from files (`metrics.jsonl`, checkpoints, `outcome.json`), so a watcher that starts late or again
sees the same. The `Job` of `runs/launchers` says whether the trainer is still there.
"""

import os
import signal
import socket
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

import psutil

from openlm_pipeline.checkpoints.folders import Checkpoint, folder_name, read_checkpoint
from openlm_pipeline.errors import BusyError, OpenLMError, TrainingError
from openlm_pipeline.experiments import Experiment
from openlm_pipeline.registry import LAUNCHERS
from openlm_pipeline.result import Say
from openlm_pipeline.runs.folder import RunFolder, is_measurement
from openlm_pipeline.runs.launchers import Launcher
from openlm_pipeline.runs.launchers.job import Job, signal_in
from openlm_pipeline.storage.files import folder_lock, is_held, write_text
from openlm_pipeline.storage.home import Home

_POLL_SECONDS = 0.5


@dataclass(frozen=True)
class Measured:
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


Event = Measured | StepSkipped | MilestoneReached


def milestone_checkpoints(experiment: Experiment, run: RunFolder) -> dict[str, Checkpoint]:
    """The complete milestones of a run by label, those of the experiment only."""
    wanted = dict(experiment.labelled_milestones())
    return {c.milestone: c for c in run.saved() if c.milestone in wanted}


def passed_over(experiment: Experiment, run: RunFolder) -> dict[str, str]:
    """Label -> why, of each milestone of the experiment whose folder is there, and whose checkpoint does not count."""
    found, why = milestone_checkpoints(experiment, run), {}
    for label, tokens in experiment.labelled_milestones():
        path = run.checkpoints / folder_name(experiment.steps(tokens))
        if label in found or not path.exists():
            continue
        what = f"{run.path / 'run.json'} is missing, which says whose it is"
        if (run.path / "run.json").exists():
            try:
                read_checkpoint(path)
                continue  # a rotating one is where the milestone will be
            except OpenLMError as e:
                what = str(e)
        on = f"`openlm train {experiment.name}` makes it again, if its files can't be brought back from a copy"
        why[label] = f"milestone {label} is passed over: {what}; {on}"
    return why


def launcher_of(
    experiment: Experiment,
    home: Home,
    run: RunFolder,
    report: Say = lambda line: None,
    allow: Collection[str] = (),
) -> Launcher:
    """The launcher that a recipe names, for its run; the arguments are those of `Launcher`."""
    return LAUNCHERS[experiment.launcher.kind](experiment, home, run, report, allow)


def is_there(experiment: Experiment, run: RunFolder, until: int) -> bool:
    """Whether all milestones up to `until` tokens have their checkpoints, and some checkpoint is as far as that."""
    saved = run.saved()
    wanted = {label for label, tokens in experiment.labelled_milestones() if tokens <= until}
    return wanted <= {c.milestone for c in saved} and any(c.step >= experiment.steps(until) for c in saved)


def train_run(
    experiment: Experiment,
    home: Home,
    run: RunFolder,
    until: int,
    report: Say,
    *,
    told: Collection[str] | None = None,
    allow: Collection[str] = (),
) -> Iterator[Event]:
    """Train up to `until` tokens; yields metrics and milestones as they come.

    A job of this run that a cluster has already is watched, and no other is submitted beside it. Closing the iterator,
    or an exception in the caller, stops the trainer, which first saves a checkpoint. If this process dies, a local
    trainer dies with it; a cluster's job continues.

    Args:
        report: takes lines on the job: that it was submitted, waits, runs.
        told: labels of milestones that are no news to the caller; by default those that are there now.
        allow: consents, as in `Launcher`.

    Raises:
        TrainingError: the trainer ended before `until`; the message holds its own reason, or the end of its log.
        BusyError: another process watches this run.
        MissingInputError: the cluster's programs are not installed here.
        ClusterError: the cluster refused the job.
    """
    wanted = {label for label, tokens in experiment.labelled_milestones() if tokens <= until}
    news = wanted - set(milestone_checkpoints(experiment, run) if told is None else told)
    with folder_lock(run.path / "launch", "watching the training"):
        run.stop_file.unlink(missing_ok=True)
        offset = run.metrics_file.stat().st_size if run.metrics_file.exists() else 0
        launcher = launcher_of(experiment, home, run, report, allow)
        job = launcher.find()
        found = job is not None
        requeues = 0
        while True:
            if job is None:
                run.clear_outcome()
                job = launcher.submit(until)
            offset = yield from _watch(experiment, run, job, offset, news)
            outcome = run.read_outcome()
            if outcome is not None and outcome["status"] == "completed":
                if not found or is_there(experiment, run, until):
                    return
                found = False  # a job that was found may have had less to do
            elif run.stop_file.exists() and (outcome is None or outcome["status"] == "preempted"):
                at = f" at step {outcome['step']:,}, which is saved" if outcome else ""
                raise TrainingError(f"training of {experiment.name} was asked to stop{at}; the same command resumes it")
            elif job.interrupted() and requeues < launcher.max_requeues:
                requeues += 1
                report(f"training was interrupted and resumes from its last checkpoint; {job.ending().splitlines()[0]}")
            else:
                how, said = job.ending(), (outcome or {}).get("reason")
                if said:  # the log would say it again, amid what torchrun prints
                    ended = signal_in(how) or how.splitlines()[0]
                    how = f"{said} ({ended}; `openlm logs {experiment.name}` has the rest)"
                elif outcome:
                    how = f"{outcome['status']}\n{how}"
                raise TrainingError(f"training of {experiment.name} ended early: {how}")
            job = None


def stop_run(experiment: Experiment, home: Home, run: RunFolder, report: Say, *, kill: bool = False) -> bool:
    """Ask the trainer of a run to save and end, whoever started it, and wait for that; whether there was one.

    Args:
        kill: one that is still there after its grace is killed, and what it did since its last checkpoint is lost.

    Raises:
        BusyError: it has not yet said which process it is, runs on another machine, or needs longer than its grace.
        ClusterError: the cluster does not answer, or can't end the job.
    """
    grace, job = experiment.launcher.grace_seconds, launcher_of(experiment, home, run).find()
    if job is None and not is_held(run.lock_folder) and not is_held(run.path / "launch"):
        return False
    waiting = f"asked to save and stop; that may take {grace} s (launcher.grace_seconds)"
    if job is not None:
        write_text(run.stop_file, "")
        report(f"its {experiment.launcher.kind} job is {waiting}")
        job.cancel()
        return True
    host, pid, created = next((e["process"] for e in reversed(run.read_ledger()) if "process" in e), ("", 0, 0.0))
    if host not in ("", socket.gethostname()):
        raise BusyError(f"its trainer is process {pid} on {host}: run this command there")
    if not host or not psutil.pid_exists(pid) or abs(psutil.Process(pid).create_time() - created) > 1:
        raise BusyError("its trainer is only starting, or an earlier release's: try again in a moment")
    write_text(run.stop_file, "")
    os.kill(pid, signal.SIGTERM)  # the other ranks hear of it from this one
    report(f"process {pid} is {waiting}")
    give_up = time.monotonic() + grace
    while is_held(run.lock_folder):
        if time.monotonic() > give_up:
            if not kill:
                late = f"process {pid} is still there after {grace} s: it saves at the end of a step"
                raise BusyError(f"{late}. Wait for it, or end it as it is: `openlm stop {experiment.name} --kill`")
            report(f"process {pid} is still there after {grace} s, and is killed")
            os.kill(pid, signal.SIGKILL)  # torchrun ends the other ranks
            kill, give_up = False, time.monotonic() + grace
        time.sleep(_POLL_SECONDS)
    return True


def _watch(experiment: Experiment, run: RunFolder, job: Job, offset: int, news: set[str]) -> Iterator[Event]:
    """What happens until a job ends; cancels it if the caller closes the iterator before.

    Args:
        news: labels of milestones to tell of; those told are removed.

    Returns:
        The place in the metrics up to which they were told.
    """
    ended = False
    steps = ((label, experiment.steps(tokens)) for label, tokens in experiment.labelled_milestones() if label in news)
    folders = {folder_name(step): (label, step) for label, step in steps}
    try:
        while not ended:
            ended = not job.running()  # read once more after the end, so that nothing is missed
            records, offset = run.new_metrics(offset)
            for record in records:
                yield Measured(record) if is_measurement(record) else StepSkipped(record)
            there = {path.name for path in run.checkpoints.glob("step-*")}
            for name in sorted(folders.keys() & there):
                label, step = folders[name]
                if checkpoint := run.milestone_at(step, label):
                    del folders[name]
                    news.remove(label)
                    yield MilestoneReached(label, checkpoint)
            if not ended:
                time.sleep(_POLL_SECONDS)
    finally:
        if not ended and job.running():
            job.cancel()
    return offset
