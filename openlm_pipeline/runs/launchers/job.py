"""What the watcher of a run asks of a job that a launcher started, and the one command that all of them start."""

import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from openlm_pipeline.runs.programs import SAFE_PATH, starting

if TYPE_CHECKING:
    from openlm_pipeline.experiments.spec import Launcher

_SIGNALS = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"
"""What torchrun passes on to its workers; by default SIGUSR1, with which Slurm warns, would kill it."""
MALLOC_ENVIRONMENT = {
    # On a CPU glibc gives each large tensor's memory back to the kernel and gets it zeroed again a moment later.
    "MALLOC_MMAP_THRESHOLD_": str(1 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 32),
}
TRAINER_DEFAULTS = {"OMP_NUM_THREADS": "1", **SAFE_PATH, **MALLOC_ENVIRONMENT}
"""Environment of the trainer where the user's own says nothing else."""


class Job(Protocol):
    """A trainer that was started, by this process or by one before it."""

    def running(self) -> bool:
        """Whether it trains or waits for its turn. Cheap: it is asked twice per second."""

    def cancel(self) -> None:
        """Ask it to save and end, then end it; returns when nothing of it runs any more."""

    def interrupted(self) -> bool:
        """Whether the cluster took away a job that ended, so that it may be submitted again."""

    def ending(self) -> str:
        """How a job ended, where the run folder does not say, and the end of its log."""


def torchrun_command(
    launcher: "Launcher",
    experiment_file: Path | str,
    until: int,
    python: str,
    rendezvous: Sequence[str],
    trainer: Sequence[str] | None = None,
    *,
    allow: Collection[str] = (),
) -> list[str]:
    """The command that one machine runs.

    Args:
        python: the interpreter on that machine.
        rendezvous: torchrun's options by which its machines find each other.
        trainer: how torchrun starts the trainer there; by default by its file on this machine.
        allow: consents of the user. Only `cpu` and `rate` are for the trainer; the others are used up before it starts,
            and do not stand for what a later start of the job would find.
    """
    return [
        python,
        "-m",
        "torch.distributed.run",
        *rendezvous,
        f"--nproc-per-node={launcher.processes}",
        f"--max-restarts={launcher.max_restarts}",
        f"--signals-to-handle={_SIGNALS}",
        f"--shutdown-timeout={launcher.grace_seconds}",
        *(trainer or starting("train")),
        str(experiment_file),
        f"--until={until}",
        *(f"--allow={name}" for name in ("cpu", "rate") if name in allow),
    ]


def signal_in(said: str) -> str | None:
    """The signal that ended the first rank that ended, in torchrun's words, if one did: it tells of that one last."""
    found = re.findall(r"Signal \d+ \(\w+\) received by PID \d+", said)
    return found[-1] if found else None


def log_end(path: Path, lines: int = 15) -> str:
    """The last lines of a log, with its path; only the path where it was not written."""
    if not path.exists():
        return f"There is no log at {path}"
    tail = "\n".join(path.read_text(errors="replace").splitlines()[-lines:])
    return f"The end of {path}:\n{tail}"
