"""The processes that score together, as torchrun starts them; one alone where it did not.

Every process builds the same batches, takes every n-th, and gets the scores of all. What is exchanged is small and
lies in main memory, so gloo carries it, whatever the device.
"""

import atexit
import os
from collections.abc import Callable
from datetime import timedelta
from functools import cache
from typing import Any, TypeVar

from openlm_pipeline.errors import OpenLMError

T = TypeVar("T")
_PATIENCE = timedelta(days=1)
"""How long one waits for another: the ends of two shares can lie far apart. torchrun ends all where one dies."""


class ScoringError(OpenLMError):
    """Another of the processes that score failed."""


class Processes:
    """This process among all that score."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size

    def gather(self, work: Callable[[], T]) -> list[T]:
        """Call `work()` on every process; the results of all, by rank, on all.

        Raises:
            ScoringError: it failed on another process. The error of this one is raised as it is.
        """
        if self.size == 1:
            return [work()]
        import torch.distributed as dist

        result, error = None, None
        try:
            result = work()
        except Exception as e:  # noqa: BLE001 - raised again below, when the others know
            error = e
        told = None if error is None else str(error) if isinstance(error, OpenLMError) else repr(error)
        box: list[Any] = [None] * self.size
        dist.all_gather_object(box, (result, told))
        if error is not None:
            raise error
        for rank, (_, other) in enumerate(box):
            if other is not None:
                raise ScoringError(f"process {rank} of {self.size}: {other}")
        return [result for result, _ in box]

    def from_first(self, make: Callable[[], T]) -> T:
        """What `make()` gives on the first process, on all; raises as `gather` does."""
        return self.gather(lambda: make() if self.rank == 0 else None)[0]  # type: ignore[return-value]


@cache
def scoring_processes() -> Processes:
    """Join the processes that torchrun started with this one, or none."""
    size = int(os.environ.get("WORLD_SIZE", 1))
    if size == 1 or "RANK" not in os.environ:
        return Processes(0, 1)
    import torch.distributed as dist

    if not dist.is_initialized():
        dist.init_process_group("gloo", timeout=_PATIENCE)
        # Once a process of three was aborted at its end while the group was still open.
        atexit.register(dist.destroy_process_group)
    return Processes(dist.get_rank(), dist.get_world_size())
