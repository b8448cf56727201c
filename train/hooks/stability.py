"""Steps that would harm the weights: left out by all ranks together, up to a number in a row.

A step left out is a step: its samples are used up, its tokens count and the learning rate moves on; weights, optimizer
state and averages stay as they were. Without this policy nothing waits for the device, and a loss that is not finite
is found at the next log step.
"""

import math
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from openlm_pipeline.errors import TrainingError
from train.hooks import HOOKS, Hook, State, Step

if TYPE_CHECKING:
    from train.loop import Trainer

_DECAY = 0.98
"""Decay of the running mean of gradient norms: it looks back some fifty steps."""
_STEPS_BEFORE_JUDGING = 20
"""Accepted steps before a gradient norm can be a spike: those of the beginning are no measure."""


@HOOKS.register("stability")
class SkippedSteps(Hook):
    """Leaves out, with `training.max_skipped_steps`, what would harm the weights; stops after too many in a row.

    It judges each step between its backward pass and the optimizer; every rank comes to the same judgement.
    """

    order = 30

    def __init__(self, trainer: "Trainer") -> None:
        super().__init__(trainer)
        training = trainer.experiment.training
        self.max_skipped_steps, self.spike_factor = training.max_skipped_steps, training.spike_factor
        self.skip_steps = frozenset(training.skip_steps)
        self.reason: str | None = None
        """Why the last step was left out; None where it was not."""
        self._state = torch.zeros(3, dtype=torch.float64)  # mean gradient norm, accepted steps, left out in a row

    @property
    def is_on(self) -> bool:
        return self.max_skipped_steps > 0 or self.spike_factor is not None

    @property
    def skipped_in_a_row(self) -> int:
        return int(self._state[2])

    def at_resume(self) -> None:
        trainer = self.trainer
        if trainer.world.rank == 0 and self.skip_steps:
            last = trainer.experiment.steps(trainer.experiment.milestones[-1])
            left_out = {record["step"] for record in trainer.run.skipped_steps()}
            if never := [s for s in sorted(self.skip_steps - left_out) if s <= trainer.step or s > last]:
                trainer.warn(f"training.skip_steps has {never}: trained already, or after the last step, {last}")

    def accepts(self, step: Step) -> bool:
        if self.trainer.step + 1 in self.skip_steps:
            self.reason = "it is one of training.skip_steps"
            return False
        self.reason = self._reason(step.loss, float(step.grad_norm)) if self.is_on else None
        if self.reason is not None:
            self._state[2] += 1
        elif self.is_on:
            decay = min(_DECAY, 1 - 1 / (float(self._state[1]) + 1))  # a plain mean until there are enough
            self._state[0] = decay * self._state[0] + (1 - decay) * float(step.grad_norm)
            self._state[1] += 1
            self._state[2] = 0
        return self.reason is None

    def _reason(self, loss: Tensor, grad_norm: float) -> str | None:
        mean, accepted, _ = self._state.tolist()
        factor = self.spike_factor
        spike = factor is not None and accepted >= _STEPS_BEFORE_JUDGING and grad_norm > factor * mean
        agreed = torch.tensor([float(loss), float(spike), float(not math.isfinite(grad_norm))], dtype=torch.float64)
        dist.all_reduce(agreed, group=self.trainer.world.cpu_group)
        total_loss, spikes, not_finite = agreed.tolist()
        if not_finite or not math.isfinite(total_loss):
            return f"loss {total_loss}, gradient norm {grad_norm}: not finite"
        if spikes:
            return f"gradient norm {grad_norm:.3g} is over {factor:g} times its mean of {mean:.3g}"
        return None

    def after_step(self, step: Step, taken: bool) -> None:
        trainer, reason = self.trainer, self.reason
        if reason is None:
            return
        count = trainer.batches.global_sequences
        first = (trainer.step - 1) * count
        if trainer.world.rank == 0:
            samples = {"first_sample": first, "num_samples": count}
            trainer.run.append_metrics({"step": trainer.step, "tokens": trainer.tokens, "skipped": reason, **samples})
        trainer.warn(f"step {trainer.step} is left out, samples {first} to {first + count - 1} of the order: {reason}")
        if self.skipped_in_a_row > self.max_skipped_steps:
            raise TrainingError(
                f"{self.skipped_in_a_row} steps in a row were left out, the last one step {trainer.step} ({reason}); "
                f"training.max_skipped_steps is {self.max_skipped_steps}. The last checkpoint before them is kept; "
                "lower the learning rate, or look at the data of these steps"
            )

    def state(self) -> State:
        """What a resumed run needs to judge as this one does."""
        return {"stability": {"state": self._state}} if self.is_on else {}
