"""No schedule but the warm-up."""

from openlm_pipeline.experiments.schedules import Schedule
from openlm_pipeline.registry import SCHEDULES


@SCHEDULES.register("constant")
class Constant(Schedule):
    """Stays at `lr`, and has no end: any milestone can be added to such a run."""

    has_horizon = False

    def after_warmup(self, step: int) -> float:
        return self.training.lr
