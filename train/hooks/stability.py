"""`training.max_skipped_steps` and `spike_factor`."""

from typing import TYPE_CHECKING

from openlm_pipeline.errors import TrainingError
from train.hooks import HOOKS, Hook, State, Step
from train.stability import Stability

if TYPE_CHECKING:
    from train.loop import Trainer


@HOOKS.register("stability")
class SkippedSteps(Hook):
    """Leaves out steps that would harm the weights, records them, and stops where they are too many in a row."""

    order = 30

    def __init__(self, trainer: "Trainer") -> None:
        super().__init__(trainer)
        self.stability = Stability(trainer.experiment.training, trainer.world)

    def accepts(self, step: Step) -> bool:
        return self.stability.accepts(step.loss, step.grad_norm)

    def after_step(self, step: Step, taken: bool) -> None:
        trainer, reason = self.trainer, self.stability.reason
        if reason is None:
            return
        count = trainer.batches.global_sequences
        first = (trainer.step - 1) * count
        if trainer.world.rank == 0:
            samples = {"first_sample": first, "num_samples": count}
            trainer.run.append_metrics({"step": trainer.step, "tokens": trainer.tokens, "skipped": reason, **samples})
        trainer.warn(f"step {trainer.step} is left out, samples {first} to {first + count - 1} of the order: {reason}")
        if self.stability.must_stop:
            raise TrainingError(
                f"{self.stability.skipped_in_a_row} steps in a row were left out, the last one step {trainer.step} "
                f"({reason}); training.max_skipped_steps is {self.stability.max_skipped_steps}. The last checkpoint "
                "before them is kept; lower the learning rate, or look at the data of these steps"
            )

    def state(self) -> State:
        state = self.stability.state_dict()
        return {"stability": state} if state else {}
