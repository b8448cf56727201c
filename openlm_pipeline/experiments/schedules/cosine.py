"""OpenLM's cosine."""

import math

from openlm_pipeline.experiments.schedules import Schedule
from openlm_pipeline.registry import SCHEDULES


@SCHEDULES.register("cosine")
class Cosine(Schedule):
    """Falls to `lr_min` at the horizon along half a cosine, and stays there (OpenLM's formula)."""

    settings = (*Schedule.settings, "lr_min", "horizon")

    def after_warmup(self, step: int) -> float:
        peak, low = self.training.lr, self.training.lr_min
        progress = min(1.0, (step - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps))
        return low + (peak - low) * (1 + math.cos(math.pi * progress)) / 2
