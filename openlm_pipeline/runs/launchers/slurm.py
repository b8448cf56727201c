"""The trainer as a Slurm job: one torchrun per node, submitted once, found again, stopped in order.

`launch/` in the run folder keeps what was submitted: `job.sbatch`, `slurm.json` (the job's id) and the log. The job's
name and working directory say which run it trains, so that a later watcher finds it even where its id was never
written down. It needs no watcher: at its time limit it saves and puts itself into the queue again, and after a
preemption Slurm does.

The run folder and this Python are on a file system that the nodes share. Needs Slurm 20.11 or later: `sbatch`,
`squeue`, `scancel`, `scontrol`; `sacct` where it has accounts.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

from pydantic import Field

from openlm_pipeline.errors import ClusterError, ConfigError, MissingInputError
from openlm_pipeline.experiments import Experiment
from openlm_pipeline.registry import LAUNCHERS
from openlm_pipeline.result import Say
from openlm_pipeline.runs.folder import RunFolder
from openlm_pipeline.runs.launchers import Launcher
from openlm_pipeline.runs.launchers.job import TRAINER_DEFAULTS, log_end, torchrun_command
from openlm_pipeline.storage.files import write_json, write_text
from openlm_pipeline.storage.home import Home
from openlm_pipeline.strict import Strict

_QUERY_SECONDS = 5.0
_POLL_SECONDS = 0.5
_KILL_SECONDS = 120
"""For Slurm to end a job after its grace; its own KillWait is 30 s by default."""
_WAITING = ("PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "SPECIAL_EXIT", "REQUEUE_FED")
_BY_THE_CLUSTER = ("PREEMPTED", "TIMEOUT", "NODE_FAIL", "BOOT_FAIL")
_READ_BY_THE_TRAINER = re.compile(
    r"PATH|PYTHONPATH|LD_LIBRARY_PATH|LANG|LC_.*|TZ|OMP_NUM_THREADS|MALLOC_.*|CUDA_.*|NCCL_.*|GLOO_.*|FI_.*|UCX_.*|TRITON_.*|TORCH.*|PYTORCH_.*"
    r"|OPENLM_.*|AWS_.*|GOOGLE_.*|AZURE_.*|FSSPEC_.*|HF_.*|WANDB_.*|SSL_CERT_.*|REQUESTS_CA_BUNDLE"
    r"|(?i:(https?|no)_proxy)"
)
"""Environment variables that a job gets by name, where they are set; their values are written nowhere."""


@dataclass(frozen=True)
class _Queued:
    """A job in the queue, as `squeue` tells it."""

    job_id: str
    state: str
    reason: str


def job_name(experiment: Experiment) -> str:
    return f"openlm-{experiment.name}-{experiment.version}"


def _slurm(*command: str, cwd: Path | None = None) -> str:
    """Output of a Slurm program.

    Raises:
        MissingInputError: it is not installed here.
        ClusterError: it failed; the message is its own.
    """
    if not shutil.which(command[0]):
        raise MissingInputError(
            f"launcher.kind is slurm, but there is no `{command[0]}` on this machine's PATH. Start this command on a "
            "node from which jobs are submitted, or set launcher.kind=local"
        )
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd)
    if done.returncode:
        raise ClusterError(f"{shlex.join(command)} failed: {(done.stderr or done.stdout).strip()}")
    return done.stdout.strip()


def _queue(name: str, folder: Path) -> list[_Queued]:
    """This user's jobs of a name that work in `folder`, oldest first. Slurm lists only those that did not end."""
    lines = _slurm(
        "squeue", "--noheader", f"--user={os.getuid()}", f"--name={name}", "--format=%i|%T|%r|%Z"
    ).splitlines()
    jobs = [line.split("|", 3) for line in lines]
    found = [_Queued(job_id, state, reason) for job_id, state, reason, where in jobs if Path(where) == folder]
    return sorted(found, key=lambda job: int(job.job_id))


@LAUNCHERS.register("slurm")
class Slurm(Launcher):
    """A Slurm job with one torchrun per node; submitted once, it puts itself into the queue again at its time limit."""

    class Settings(Strict):
        """The `sbatch` options of `launcher.kind: slurm`; what is left out is the cluster's default."""

        partition: str | None = None
        account: str | None = None
        qos: str | None = None
        constraint: str | None = None
        time_limit: str | None = None
        """As Slurm writes it, such as `24:00:00` or `2-00:00:00`."""
        gpus_per_node: int | None = Field(default=None, ge=1)
        cpus_per_task: int | None = Field(default=None, ge=1)
        """CPU cores per node, as one task, torchrun, runs on each."""
        memory: str | None = None
        """Memory per node, such as `512G`."""
        options: dict[str, str | int | bool] = {}
        """Any other long option of sbatch by its name: `{reservation: training, exclusive: true}`. It stands above the
        options written here; false leaves one out."""
        setup: tuple[str, ...] = ()
        """Shell lines that the job runs first on its first node, such as `module load cuda`."""
        environment: tuple[str, ...] = ()
        """Names of environment variables that the job gets from the launching process, besides those that the trainer
        and its libraries are known to read."""
        max_requeues: int = Field(default=100, ge=0)
        """Times that a run which the time limit or a preemption stopped goes into the queue again."""

    @property
    def max_requeues(self) -> int:
        return self.settings.max_requeues

    def find(self) -> "SlurmJob | None":
        jobs = [j for j in _queue(job_name(self.experiment), self.run.path.resolve()) if j.state != "COMPLETING"]
        if not jobs:
            return None
        there = f"Slurm job {jobs[0].job_id} of this run is {jobs[0].state.lower()} already"
        self.report(f"{there}: it is watched, none is added")
        return SlurmJob(self.experiment, self.run, jobs[0].job_id, self.report)

    def submit(self, until: int) -> "SlurmJob":
        folder = self.run.path / "launch"
        write_text(folder / "job.sbatch", self.show(until))
        job_id = _slurm("sbatch", "--parsable", str(folder / "job.sbatch"), cwd=self.run.path.resolve()).split(";")[0]
        job = SlurmJob(self.experiment, self.run, job_id, self.report)
        write_json(folder / "slurm.json", {"job_id": job_id, "name": job_name(self.experiment), "until": until})
        self.report(f"Slurm job {job_id} submitted; its log: {job.log}")
        return job

    def show(self, until: int) -> str:
        return job_script(self.experiment, self.home, self.run, until, self.allow)


def job_script(experiment: Experiment, home: Home, run: RunFolder, until: int, allow: Collection[str] = ()) -> str:
    """The batch script; it names environment variables, and holds none of their values but `OPENLM_HOME`."""
    launcher = experiment.launcher
    torchrun = torchrun_command(
        launcher,
        run.experiment_file.resolve(),
        until,
        sys.executable,
        [f"--nnodes={launcher.nodes}", "--rdzv-backend=c10d"],
        allow=allow,
    )
    at = torchrun.index("--rdzv-backend=c10d") + 1
    rendezvous = '"--rdzv-endpoint=$head:$port" "--rdzv-id=$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}"'
    defaults = [f'export {name}="${{{name}:-{value}}}"' for name, value in TRAINER_DEFAULTS.items()]
    outcome = shlex.quote(str(run.path.resolve() / "outcome.json"))
    lines = [
        "#!/bin/bash",
        *_directives(experiment),
        "",
        *launcher.settings.setup,
        f"export OPENLM_HOME={shlex.quote(str(home.root.resolve()))}",
        *defaults,
        f"rm -f {outcome}*  # of an earlier start of this job",
        "head=$(hostname)  # this script runs on the first of the job's nodes",
        "port=$((20000 + SLURM_JOB_ID % 12000))",
        "time_is_up=0",
        "trap 'time_is_up=1; signalled=1; kill -USR1 $step' USR1  # srun passes it on; the trainers save and end",
        "trap 'signalled=1' TERM  # Slurm sends it to the trainers as well",
        # Since 22.05 srun no longer takes this from the job by itself.
        'cpus="${SLURM_CPUS_PER_TASK:+--cpus-per-task=$SLURM_CPUS_PER_TASK}"',
        f"srun --export=ALL --kill-on-bad-exit=1 $cpus {shlex.join(torchrun[:at])} {rendezvous} \\",
        f"  {shlex.join(torchrun[at:])} &",
        "step=$!",
        "signalled=1",
        "while [ $signalled = 1 ]; do signalled=0; wait $step; status=$?; done  # a signal ends a wait, not the step",
        f'if [ $time_is_up = 1 ] && [ "${{SLURM_RESTART_COUNT:-0}}" -lt {launcher.settings.max_requeues} ] \\',
        f'  && grep -q \'"status": "preempted"\' {outcome}; then',
        '  scontrol requeue "$SLURM_JOB_ID"',
        "fi",
        "exit $status",
    ]
    return "\n".join(lines) + "\n"


def _directives(experiment: Experiment) -> list[str]:
    """The `#SBATCH` lines.

    Raises:
        ConfigError: an option cannot stand in one line.
    """
    launcher, slurm = experiment.launcher, experiment.launcher.settings
    names = sorted(n for n in os.environ if _READ_BY_THE_TRAINER.fullmatch(n) or n in slurm.environment)
    options: dict[str, str | int | bool | None] = {
        "job-name": job_name(experiment),
        "partition": slurm.partition,
        "account": slurm.account,
        "qos": slurm.qos,
        "constraint": slurm.constraint,
        "time": slurm.time_limit,
        "nodes": launcher.nodes,
        "ntasks-per-node": 1,
        "cpus-per-task": slurm.cpus_per_task,
        "gpus-per-node": slurm.gpus_per_node,
        "mem": slurm.memory,
        "export": ",".join(names) or "NONE",
        # To this script alone, which then knows that it was the time limit.
        "signal": f"B:USR1@{launcher.grace_seconds}",
        "requeue": True,
        "open-mode": "append",
        "output": "launch/slurm-%j.log",
        # One job of a name at a time: should two watchers ever submit at once, the second job waits for the first.
        "dependency": "singleton",
        **slurm.options,
    }
    lines = []
    for name, value in options.items():
        if "\n" in f"{name}{value}":
            raise ConfigError(f"launcher.slurm: the option {name!r} has a line break in it")
        if value is True:
            lines.append(f"#SBATCH --{name}")
        elif value is not None and value is not False:
            lines.append(f"#SBATCH --{name}={shlex.quote(str(value))}")
    return lines


class SlurmJob:
    """A job in the queue; its state is asked for every few seconds, and at once when the trainer wrote its outcome."""

    def __init__(self, experiment: Experiment, run: RunFolder, job_id: str, report: Say) -> None:
        self.job_id = job_id
        self.log = run.path / "launch" / f"slurm-{job_id}.log"
        self._name, self._run, self._launcher = job_name(experiment), run, experiment.launcher
        self._report = report
        self._asked_at = float("-inf")
        self._is_there, self._waits, self._said = True, True, ""

    def running(self) -> bool:
        due = time.monotonic() - self._asked_at >= _QUERY_SECONDS
        if self._is_there and (due or (not self._waits and self._run.read_outcome() is not None)):
            self._asked_at = time.monotonic()
            try:
                job = self._in_queue()
            except ClusterError as e:  # a controller that is restarted comes back, and so does the job
                self._say(f"is not known of at the moment, and asked for again: {e}")
            else:
                self._is_there = job is not None
                if job:
                    self._waits = job.state in _WAITING
                    self._say(f"is {job.state.lower()}" + (f": {job.reason}" if self._waits else ""))
        return self._is_there

    def _in_queue(self) -> _Queued | None:
        return next((j for j in _queue(self._name, self._run.path.resolve()) if j.job_id == self.job_id), None)

    def _say(self, state: str) -> None:
        if state != self._said:
            self._said = state
            self._report(f"Slurm job {self.job_id} {state}")

    def cancel(self) -> None:
        """SIGTERM to the trainers, `launcher.grace_seconds` for them to save, then `scancel`.

        Raises:
            ClusterError: Slurm does not answer all the while, or cannot end it.
        """
        self._wait_for_end(self._launcher.grace_seconds, self._ask_to_save)
        if self._is_there:
            self._wait_for_end(_KILL_SECONDS, self._end)
        if self._is_there:
            raise ClusterError(f"Slurm job {self.job_id} does not end; look with `scontrol show job {self.job_id}`")

    def _ask_to_save(self, job: _Queued) -> None:
        _slurm("scancel", *([] if job.state in _WAITING else ["--signal=TERM"]), self.job_id)

    def _end(self, _: _Queued) -> None:
        _slurm("scancel", self.job_id)

    def _wait_for_end(self, seconds: float, act: Callable[[_Queued], None]) -> None:
        """Do `act` once in each state of the job, until it left the queue or the time is up."""
        give_up = time.monotonic() + seconds
        acted_in = None
        while True:
            try:
                job = self._in_queue()
                self._is_there = job is not None
                if job and job.state not in (acted_in, "COMPLETING"):
                    act(job)
                    acted_in = job.state
            except ClusterError:  # Slurm is away for a moment, or the job ended between the two commands
                if time.monotonic() > give_up:
                    raise
            if not self._is_there or time.monotonic() > give_up:
                return
            time.sleep(_POLL_SECONDS)

    def interrupted(self) -> bool:
        """By preemption, a time limit or a lost node, where Slurm did not put it into the queue again itself."""
        state = self._final_state()
        outcome = self._run.read_outcome()
        preempted = outcome is not None and outcome["status"] == "preempted"
        return state in _BY_THE_CLUSTER or (preempted and state != "CANCELLED")

    def ending(self) -> str:
        return f"Slurm job {self.job_id} ended as {self._final_state()}\n{log_end(self.log)}"

    def _final_state(self) -> str:
        """From the controller, which forgets a job after some minutes, or the accounts where there are any."""
        commands = (
            (["scontrol", "--oneliner", "show", "job", self.job_id], r"\bJobState=(\w+)"),
            (
                ["sacct", "--noheader", "--allocations", "--parsable2", f"--jobs={self.job_id}", "--format=State"],
                r"(\w+)",
            ),
        )
        for command, pattern in commands:
            try:
                found = re.search(pattern, _slurm(*command))
            except (ClusterError, MissingInputError):
                continue  # it is not known there
            if found:
                return found[1]
        return "UNKNOWN"
