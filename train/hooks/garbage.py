"""Python's garbage collector, run at the same step on every rank: one rank's pause makes all others wait."""

import gc

from train.hooks import HOOKS, Hook, Step

_EVERY_STEPS = 200


@HOOKS.register("garbage")
class Garbage(Hook):
    """Collects what is young every so many steps, and nothing in between."""

    def at_start(self, until: int) -> None:
        gc.collect()
        gc.freeze()
        gc.disable()

    def after_step(self, step: Step, taken: bool) -> None:
        if self.trainer.step % _EVERY_STEPS == 0:
            gc.collect(1)

    def at_end(self) -> None:
        gc.enable()
        gc.unfreeze()
