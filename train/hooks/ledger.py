"""Events of `ledger.jsonl`: when this process began and on what, when it had its weights, how it ended."""

import os
import platform
import socket
import time
from collections import Counter
from typing import TYPE_CHECKING, Any

import psutil
import torch

from openlm_pipeline.runs.environment import code_version, software
from train.hooks import HOOKS, Hook

if TYPE_CHECKING:
    from train.loop import Trainer


@HOOKS.register("ledger")
class Ledger(Hook):
    """Adds to the run's ledger, on rank 0; it is in no identity and no checkpoint."""

    order = 5

    def __init__(self, trainer: "Trainer") -> None:
        super().__init__(trainer)
        world, created, now = trainer.world, psutil.Process().create_time(), time.time()
        self._open = world.rank == 0
        what = {
            # Python and torch were imported for this alone where torchrun started it.
            "began": round(created if "TORCHELASTIC_RUN_ID" in os.environ else now, 3),
            "hosts": sorted({host for host, _ in world.places}),
            "devices": Counter(device for _, device in world.places),
            "world_size": world.size,
            "code": code_version(),
            "software": f"python {platform.python_version()}, torch {torch.__version__}",
            "launcher": trainer.experiment.launcher.kind,
            "job": os.environ.get("SLURM_JOB_ID"),
            "process": [socket.gethostname(), os.getpid(), created],
        }
        world.from_rank0(lambda: self._begin(what))

    def _begin(self, what: dict[str, Any]) -> None:
        backends = {
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        }
        made_with = self.trainer.run.add_environment({**software(), **backends})
        self.trainer.run.append_ledger("start", **what, environment=made_with)

    def at_resume(self) -> None:
        if self._open:
            self.trainer.run.append_ledger("resume", step=self.trainer.step, tokens=self.trainer.tokens)

    def at_outcome(self) -> None:
        if self._open:
            self._open = False
            self.trainer.run.append_ledger("end", **(self.trainer.run.read_outcome() or {"status": "failed"}))

    def close(self) -> None:
        self.at_outcome()  # after an error
