"""A trace of some steps of rank 0, as a file for https://ui.perfetto.dev: `profile/steps-FIRST-LAST.json.gz`."""

from typing import TYPE_CHECKING

import torch
from torch.profiler import ProfilerActivity, profile

from openlm_pipeline.errors import ConfigError
from train.hooks import HOOKS, Hook

if TYPE_CHECKING:
    from train.loop import Trainer


@HOOKS.register("profile")
class Profile(Hook):
    """Watches steps `execution.profile_steps`, first to last, counted from 1."""

    order = 10

    def __init__(self, trainer: "Trainer") -> None:
        """
        Raises:
            ConfigError: the steps are not in order.
        """
        super().__init__(trainer)
        steps = trainer.experiment.execution.profile_steps
        if steps and not 1 <= steps[0] <= steps[1]:
            raise ConfigError(f"execution.profile_steps {list(steps)} should be the first and the last of some steps")
        self.folder = trainer.run.path / "profile"
        self.steps = steps if trainer.world.rank == 0 else None
        self.profiler: profile | None = None
        self.started_after = 0

    def before_step(self) -> None:
        step = self.trainer.step
        if self.steps and not self.profiler and self.steps[0] - 1 <= step < self.steps[1]:
            activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
            self.profiler = profile(activities=activities, record_shapes=True, profile_memory=True)
            self.profiler.start()
            self.started_after = step
        elif self.profiler and step >= self.steps[1]:
            self.close()

    def at_end(self) -> None:
        if self.steps and not self.profiler:
            self.trainer.warn(f"no trace was written: no step of {list(self.steps)} (profile_steps) was trained here")

    def close(self) -> None:
        """Write what was seen so far, if anything."""
        if not self.profiler:
            return
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # so that kernels of the last step that still run are in the trace
        profiler, self.profiler, self.steps = self.profiler, None, None
        profiler.stop()
        self.folder.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(self.folder / f"steps-{self.started_after + 1}-{self.trainer.step}.json.gz"))
