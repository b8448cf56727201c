"""Warm-up, stable, decay (https://arxiv.org/abs/2404.06395), with the power of OpenLM's cooldown."""

from openlm_pipeline.experiments.schedules import Schedule
from openlm_pipeline.registry import SCHEDULES


@SCHEDULES.register("wsd")
class WarmupStableDecay(Schedule):
    """Stays, then falls to `lr_min` over the last `decay` tokens, as (steps left / decay steps) to `decay_power`."""

    settings = (*Schedule.settings, "lr_min", "decay", "decay_power", "horizon")

    def after_warmup(self, step: int) -> float:
        peak, low = self.training.lr, self.training.lr_min
        decay_steps = self.steps(self.training.decay)
        left = max(0, self.total_steps - step)
        if left >= decay_steps:
            return peak
        return low + (peak - low) * (left / decay_steps) ** self.training.decay_power

    def shortest(self) -> int:
        return self.training.warmup + self.training.decay

    def stable_until(self, horizon: int) -> int:
        return horizon - self.training.decay
