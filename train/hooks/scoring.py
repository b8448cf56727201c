"""Scores of a part of the suite while a run goes on: `evaluation.while_training`. Nothing waits for them."""

import os
import queue
import subprocess
import sys
import threading
from typing import TYPE_CHECKING

from openlm_pipeline.checkpoints.folders import Checkpoint
from train.hooks import HOOKS, Hook

if TYPE_CHECKING:
    from train.loop import Trainer


@HOOKS.register("scoring")
class ScoresBeside(Hook):
    """Each milestone's scores by a process of its own, one after the other, into the run's `scoring.log`.

    What has begun goes on when training ends; what has not is named.
    """

    def __init__(self, trainer: "Trainer") -> None:
        super().__init__(trainer)
        evaluation = trainer.experiment.evaluation
        self.part = evaluation.while_training if evaluation else None
        self._labels: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._ended = threading.Event()
        if self.part and trainer.world.rank == 0:
            threading.Thread(target=self._work, name="scoring", daemon=True).start()

    def at_checkpoint(self, checkpoint: Checkpoint) -> None:
        if self.part and checkpoint.milestone:
            self._labels.put(checkpoint.milestone)

    def close(self) -> None:
        self._ended.set()
        if left := [self._labels.get() for _ in range(self._labels.qsize())]:
            self.trainer.console.print(f"not scored while training: {', '.join(left)}; `openlm evaluate` scores them")

    def _work(self) -> None:
        from openlm_pipeline.evaluation.suite import Part  # only where something is scored

        trainer, part = self.trainer, self.part
        command = ["nice", "-n", "10", sys.executable, "-m", "openlm_pipeline", "evaluate"]
        options = Part(part.tasks, part.limit).options(part.device)
        of_torchrun = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
        environment = {k: v for k, v in os.environ.items() if k not in of_torchrun} | trainer.home.variables
        environment["OMP_NUM_THREADS"] = str(part.threads)
        while not self._ended.is_set():
            label = self._labels.get()
            with (trainer.run.path / "scoring.log").open("ab") as log:
                done = subprocess.run(
                    [
                        *command,
                        str(trainer.run.experiment_file),
                        f"--milestone={label}",
                        *options,
                    ],
                    env=environment,
                    stdout=log,
                    stderr=log,
                    stdin=subprocess.DEVNULL,
                    start_new_session=True,
                )
            said = "scored" if done.returncode == 0 else f"not scored, exit code {done.returncode}"
            trainer.console.print(f"milestone {label} {said}: see {log.name}")
