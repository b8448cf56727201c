"""Ways to start the trainer of a run, one module each: on this machine, under Slurm, in Kubernetes.

A launcher starts and stops processes, and says whether they are there. What training does is read from the run folder.
"""

from abc import ABC, abstractmethod
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

from openlm_pipeline.result import Say
from openlm_pipeline.runs.launchers.job import Job
from openlm_pipeline.storage.home import Home
from openlm_pipeline.strict import Strict

if TYPE_CHECKING:
    from openlm_pipeline.experiments import Experiment, spec
    from openlm_pipeline.runs.folder import RunFolder


class Launcher(ABC):
    """A way to start the trainer, for one run."""

    class Settings(Strict):
        """What a recipe may say at `launcher.NAME`; here nothing."""

    def __init__(
        self, experiment: "Experiment", home: Home, run: "RunFolder", report: Say, allow: Collection[str] = ()
    ) -> None:
        """
        Args:
            report: takes lines on the job: that it was submitted, waits, runs.
            allow: consents; those that the trainer asks for on its own machine are passed on to it.
        """
        self.allow = allow
        self.experiment, self.home, self.run, self.report = experiment, home, run, report
        self.common: spec.Launcher = experiment.launcher
        """What a recipe says whatever the launcher, such as `nodes`."""
        self.settings: Any = experiment.launcher.settings
        """The class's own `Settings`."""

    @classmethod  # noqa: B027 - most have nothing to look at
    def check(cls, common: "spec.Launcher") -> None:
        """Look at a recipe's settings together, when it is loaded.

        Raises:
            ValueError: they do not go together.
        """

    @property
    def max_requeues(self) -> int:
        """Times that a job which says that it was `interrupted` is submitted again."""
        return 0

    def find(self) -> Job | None:
        """The job of this run that is there already, as after the process that submitted it died.

        None where a trainer dies with its watcher.

        Raises:
            MissingInputError: the cluster's programs are not installed here.
            ClusterError: the cluster does not answer.
        """
        return None

    def log_end(self, lines: int) -> str:
        """The end of what the trainer prints, where no file in the run folder has it; else nothing."""
        return ""

    @abstractmethod
    def submit(self, until: int) -> Job:
        """Start the training of the run up to `until` tokens.

        Raises:
            MissingInputError: the cluster's programs are not installed here.
            ClusterError: the cluster refused it; the message is its own.
        """

    @abstractmethod
    def show(self, until: int) -> str:
        """What `submit` would start: a shell command, a batch script, a manifest. It starts and writes nothing."""
