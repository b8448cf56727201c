"""The trainer on this machine: a torchrun child that dies with its parent."""

import os
import shlex
import subprocess
import sys
from contextlib import suppress

import psutil

from openlm_pipeline.experiments import Experiment, spec
from openlm_pipeline.registry import LAUNCHERS
from openlm_pipeline.runs.folder import RunFolder
from openlm_pipeline.runs.launchers import Launcher
from openlm_pipeline.runs.launchers.job import TRAINER_DEFAULTS, log_end, torchrun_command
from openlm_pipeline.runs.programs import dying_with_us
from openlm_pipeline.storage.home import Home

_LOG = "train.log"


@LAUNCHERS.register("local")
class Local(Launcher):
    """torchrun on this machine; it dies with the process that watches it."""

    @classmethod
    def check(cls, common: spec.Launcher) -> None:
        if common.nodes > 1:
            raise ValueError("kind 'local' is this machine: nodes must be 1; 'slurm' and 'kubernetes' have several")

    def submit(self, until: int) -> "LocalJob":
        return LocalJob(self.experiment, self.home, self.run, self._command(until))

    def show(self, until: int) -> str:
        return shlex.join(self._command(until))

    def _command(self, until: int) -> list[str]:
        experiment_file = self.run.experiment_file
        return torchrun_command(self.common, experiment_file, until, sys.executable, ["--standalone"], allow=self.allow)


class LocalJob:
    """torchrun with its workers."""

    def __init__(self, experiment: Experiment, home: Home, run: RunFolder, command: list[str]) -> None:
        self._grace_seconds = experiment.launcher.grace_seconds
        self._log = run.path / _LOG
        with self._log.open("ab") as log:
            # In a session of its own, so that Ctrl-C reaches this process only, which then stops the trainer in order.
            self._process = subprocess.Popen(
                dying_with_us(command),
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**TRAINER_DEFAULTS, **os.environ, "OPENLM_HOME": str(home.root)},
                start_new_session=True,
            )

    def running(self) -> bool:
        return self._process.poll() is None

    def cancel(self) -> None:
        """SIGTERM and `launcher.grace_seconds` to save, then SIGKILL for all that descends from torchrun.

        Its workers have process groups of their own, so no signal to a group reaches them.
        """
        try:
            below = psutil.Process(self._process.pid).children(recursive=True)
            self._process.terminate()
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(self._grace_seconds)
        finally:  # also when a second Ctrl-C cuts the waiting short
            with suppress(psutil.NoSuchProcess):
                below += psutil.Process(self._process.pid).children(recursive=True)
            self._process.kill()
            for process in below:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            self._process.wait()
            psutil.wait_procs(below, timeout=5)

    def interrupted(self) -> bool:
        return False

    def ending(self) -> str:
        return f"exit code {self._process.returncode}\n{log_end(self._log)}"
