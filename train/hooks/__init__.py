"""Hooks: what watches a run or adds to its records, without a line of its own in the loop. One module each.

All that are registered are part of every run; one that has nothing to do there does nothing. A new metric is one new
file in this package: a subclass of `Hook` under `@HOOKS.register("name")` whose `record` gives the metric.
"""

import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from openlm_pipeline.checkpoints.folders import Checkpoint
from openlm_pipeline.registry import Registry

if TYPE_CHECKING:
    from train.loop import Trainer

HOOKS: Registry["Hook"] = Registry("hook", "train.hooks", "Hook")
State = dict[str, dict[str, Tensor]]
"""Named state dicts that a checkpoint holds beside those of model and optimizer."""


@dataclass(frozen=True)
class Step:
    """One optimizer step. What is on the device is not waited for."""

    lr: float
    loss: Tensor
    """This rank's share of the mean loss in nats per token, 0-d."""
    grad_norm: Tensor
    """The norm of all gradients before clipping, 0-d; the same on all ranks."""
    data_wait_seconds: float
    num_targets: Tensor | int
    """Tokens of the global batch that were predicted."""


class Hook:
    """Does nothing at each point of a run; a hook has what it wants to do. Every rank has its own, called alike.

    Within a step: `before_step`, `accepts`, `after_step`, `record` where one is due, `between_steps`, the agreement of
    all ranks on going on, then a save.
    """

    order: ClassVar[int] = 50
    """Hooks with lower numbers come first at each point, those with the same number by name."""

    def __init__(self, trainer: "Trainer") -> None:
        """`trainer` has its model and optimizer; `trainer.step` steps are done at any time."""
        self.trainer = trainer

    def at_start(self, until: int) -> None:
        """Training to `until` tokens begins; before checkpoints are looked at."""

    def at_beginning(self, loaded: Collection[str]) -> None:
        """The model was given the weights that a new run begins with, and the states called `loaded` a parent's; before
        that, or a checkpoint's, its weights are anything."""

    def at_resume(self) -> None:
        """Steps are about to be made from `trainer.step`: of a checkpoint just loaded, or where the last ones ended."""

    def before_step(self) -> None:
        """A step begins."""

    def accepts(self, step: Step) -> bool:
        """Whether the optimizer may take the step; it is left out if one hook says no. Gradients are there."""
        return True

    def after_step(self, step: Step, taken: bool) -> None:
        """The step is made and counted, or was left out, which counts too. Nothing here waits for the device."""

    def record(self) -> dict[str, float]:
        """Fields of this hook in a record of `metrics.jsonl`, which is due every `execution.log_every` steps."""
        return {}

    def at_record(self, record: dict[str, Any]) -> None:
        """A record was written; on rank 0 alone."""

    def between_steps(self) -> None:
        """What takes its time and is no part of a step; it counts for no speed. A rank that needs
        `execution.hang_seconds` longer than another is taken for a hang."""

    def before_agreement(self) -> None:
        """`between_steps` is over here, and this rank waits until all know whether to go on."""

    def after_agreement(self) -> None:
        """All know it."""

    def at_milestone(self) -> dict[str, float]:
        """Numbers that are kept with the milestone that is about to be saved."""
        return {}

    def at_checkpoint(self, checkpoint: Checkpoint) -> None:
        """A checkpoint is complete; on rank 0 alone, maybe in the thread that wrote it."""

    def holds(self) -> Collection[int]:
        """Steps whose checkpoints must not be rotated away yet; asked as `at_checkpoint` is."""
        return ()

    def state(self) -> State:
        """Tensors that a checkpoint holds. Loading one writes into these."""
        return {}

    def at_end(self) -> None:
        """Training has ended, maybe by an error."""

    def at_outcome(self) -> None:
        """`outcome.json` says that this process ended without an error."""

    def close(self) -> None:
        """The process ends."""


class Hooks:
    """The hooks of a run in their order."""

    def __init__(self, trainer: "Trainer") -> None:
        classes = sorted(HOOKS, key=lambda named: (named[1].order, named[0]))
        self._hooks = [hook(trainer) for _, hook in classes]
        self.paused_seconds = 0.0
        """Time spent in `between_steps` and waiting for a checkpoint; no part of the time of the steps around it."""

    def __iter__(self) -> Iterator[Hook]:
        return iter(self._hooks)

    def accept(self, step: Step) -> bool:
        """Whether all do; each is asked, so that it knows of every step."""
        judgements = [hook.accepts(step) for hook in self]
        return all(judgements)

    def between_steps(self) -> None:
        began = time.perf_counter()
        for hook in self:
            hook.between_steps()
        self.paused_seconds += time.perf_counter() - began

    def record(self) -> dict[str, Any]:
        return {key: value for hook in self for key, value in hook.record().items()}

    def at_milestone(self) -> dict[str, float]:
        return {key: value for hook in self for key, value in hook.at_milestone().items()}

    def state(self) -> State:
        return {name: state for hook in self for name, state in hook.state().items()}

    def holds(self) -> set[int]:
        return {step for hook in self for step in hook.holds()}
