"""Learning-rate schedules as functions of tokens, so that they do not depend on the batch size. One module each."""

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar

from openlm_pipeline.experiments.choices import Choice

if TYPE_CHECKING:
    from openlm_pipeline.experiments.spec import Training


class Schedule(Choice, ABC):
    """Base of all schedules: a linear warm-up, then what `after_warmup` says, never below `training.lr_floor`.

    A subclass under `@SCHEDULES.register("name")` says what comes after the warm-up. `settings` of a subclass are the
    fields of `Training` that it reads beside those of this class.
    """

    field = "schedule"
    settings: ClassVar[tuple[str, ...]] = ("lr", "warmup", "lr_floor")
    has_horizon: ClassVar[bool] = True
    """Whether it ends, at `training.horizon` or the last milestone. One that does not is not given `total_steps`."""

    def __init__(self, training: "Training", horizon: int | None = None) -> None:
        """
        Args:
            horizon: tokens at which it ends, counted from where it begins.

        Raises:
            ConfigError: see `Choice`.
        """
        super().__init__(training)
        self.warmup_steps = self.steps(training.warmup)
        self.total_steps = None if horizon is None else self.steps(horizon)

    def steps(self, tokens: int) -> int:
        """Optimizer steps that reach `tokens`, rounded up."""
        return -(-tokens // self.training.global_batch)

    def rate(self, step: int) -> float:
        """Learning rate of optimizer step `step`, counted from 0 where the schedule begins; a pure function.

        Warm-up is linear and reaches `lr` with its last step.
        """
        if step < self.warmup_steps:
            return self.training.lr * (step + 1) / self.warmup_steps
        return max(self.training.lr_floor, self.after_warmup(step))

    @abstractmethod
    def after_warmup(self, step: int) -> float:
        """Learning rate of a step that is not in the warm-up."""

    def shortest(self) -> int:
        """Tokens that it has to be long, at least."""
        return self.training.warmup

    def stable_until(self, horizon: int) -> int | None:
        """Tokens up to which the rates are the same for any later horizon; None where all rates depend on it."""
        return None
