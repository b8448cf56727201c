"""Collectives may take long until the first step is made, and no longer."""

from datetime import timedelta

import torch.distributed as dist
from torch.distributed.distributed_c10d import _set_pg_timeout
from torch.distributed.tensor import DTensor

from train.hooks import HOOKS, Hook, Step

_STEP_TIMEOUT = timedelta(minutes=10)


@HOOKS.register("timeouts")
class Timeouts(Hook):
    """After a process's first step, a collective of the GPUs that takes ten minutes is a failure."""

    _is_set = False

    def after_step(self, step: Step, taken: bool) -> None:
        if self._is_set or self.trainer.world.device.type != "cuda":
            return
        meshes = {p.device_mesh for p in self.trainer.model.parameters() if isinstance(p, DTensor)}
        for group in [dist.group.WORLD, *(group for mesh in meshes for group in mesh.get_all_groups())]:
            _set_pg_timeout(_STEP_TIMEOUT, group)  # torchtitan's way; there is no public name
        self._is_set = True
