"""A thread that ends a process whose step takes too long, after it has written down what every thread was doing.

Other ranks wait for the one that hangs, so each finds out by itself. Where the interpreter's lock is never given back,
so that no thread of Python runs, `faulthandler`'s own thread does the same a little later.
"""

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

import torch
import torch.distributed as dist

from openlm_pipeline.storage.files import atomic_writer
from train.hooks import HOOKS, Hook

if TYPE_CHECKING:
    from train.loop import Trainer

EXIT_CODE = 70
FIRST_STEP_SECONDS = 900.0
"""The first step may take this much longer: kernels are compiled, and connections made."""
_MAX_POLL_SECONDS = 1.0


def record_collectives() -> None:
    """Have process groups that are made from now on keep a record of their last collectives, for a dump."""
    for name in ("TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE"):  # the latter until torch 2.9
        os.environ.setdefault(name, "2000")


class Watchdog:
    """Watches the steps of this process: `step` begins one, `pause` says that there is none for now."""

    def __init__(self, seconds: float | None, folder: Path, rank: int, on_hang: Callable[[str], None]) -> None:
        """
        Args:
            seconds: length of a step that is a hang; None watches nothing.
            folder: for `stacks-rank-N.txt` and `collectives-rank-N.json`.
            on_hang: called with what happened before the process ends.
        """
        self._seconds, self._folder, self._rank, self._on_hang = seconds, folder, rank, on_hang
        self._deadline: float | None = None
        self._first = True
        self._closed = threading.Event()

    @contextmanager
    def watching(self) -> Iterator[None]:
        if self._seconds is None:
            yield
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        with (self._folder / f"stacks-rank-{self._rank}.txt").open("w") as stacks:
            thread = threading.Thread(target=self._watch, args=(stacks,), name="watchdog", daemon=True)
            self._arm(stacks)
            thread.start()
            try:
                yield
            finally:
                self._closed.set()
                thread.join()
                faulthandler.cancel_dump_traceback_later()

    def step(self) -> None:
        """A step begins, or what takes no longer than one."""
        if self._seconds is not None:
            self._deadline = time.monotonic() + self._seconds + (FIRST_STEP_SECONDS if self._first else 0)

    def pause(self) -> None:
        """The step has ended, and what comes now may take its time: a milestone, a wait for the disk."""
        if self._deadline is not None:
            self._deadline, self._first = None, False

    def _watch(self, stacks: TextIO) -> None:
        poll = min(_MAX_POLL_SECONDS, self._seconds / 4)
        while not self._closed.wait(poll):
            self._arm(stacks)
            deadline = self._deadline
            if deadline is not None and time.monotonic() > deadline:
                self._end(stacks)

    def _arm(self, stacks: TextIO) -> None:
        """It goes off only if the watching thread does not come round to put it off, for as long as a hang takes."""
        faulthandler.dump_traceback_later(self._seconds + 2 * _MAX_POLL_SECONDS, exit=True, file=stacks)

    def _end(self, stacks: TextIO) -> None:
        faulthandler.dump_traceback(stacks, all_threads=True)
        stacks.flush()
        message = f"hang: a step took over {self._seconds:g} seconds; what each rank did is in {self._folder}"
        try:
            self._dump_collectives()
            self._on_hang(message)
        except Exception as e:  # noqa: BLE001 - the process ends in any case
            message += f" ({type(e).__name__}: {e})"
        print(f"error: rank {self._rank}: {message}", file=sys.stderr, flush=True)
        os._exit(EXIT_CODE)  # the main thread can't be asked to end: it hangs

    def _dump_collectives(self) -> None:
        if not dist.is_initialized():
            return
        # The recorder of NCCL's groups is another than that of the rest, and a build without NCCL has only one.
        for kind, dump in (("", "_dump_fr_trace_json"), ("-nccl", "_dump_nccl_trace_json")):
            if hasattr(torch._C._distributed_c10d, dump):
                record = getattr(torch._C._distributed_c10d, dump)()
                with atomic_writer(self._folder / f"collectives{kind}-rank-{self._rank}.json") as f:
                    f.write(record if isinstance(record, bytes) else record.encode())


@HOOKS.register("watchdog")
class HangWatch(Hook):
    """Ends a process whose step, or whose wait for the others after one, takes `execution.hang_seconds`; what is done
    between steps may take its time."""

    order = 20

    def __init__(self, trainer: "Trainer") -> None:
        super().__init__(trainer)
        seconds, folder = trainer.experiment.execution.hang_seconds, trainer.run.path / "hangs"
        self.watchdog = Watchdog(seconds, folder, trainer.world.rank, self._on_hang)
        self._watching = ExitStack()

    def at_start(self, until: int) -> None:
        self._watching.enter_context(self.watchdog.watching())

    def before_step(self) -> None:
        self.watchdog.step()

    def between_steps(self) -> None:
        self.watchdog.pause()

    def before_agreement(self) -> None:
        self.watchdog.step()

    def after_agreement(self) -> None:
        self.watchdog.pause()

    def at_end(self) -> None:
        self._watching.close()

    def _on_hang(self, reason: str) -> None:
        trainer = self.trainer
        if trainer.world.rank == 0:
            trainer.run.write_outcome("failed", trainer.step, trainer.tokens, reason=reason)
