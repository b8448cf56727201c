"""Names a rank that all others wait for. In step with each other, all seem as slow as it; so each times what it does
alone: one block's forward pass, with its weights gathered, and waiting for data."""

import time
from collections import Counter, deque
from statistics import mean, median_low
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn

from train.hooks import HOOKS, Hook, Step

if TYPE_CHECKING:
    from train.loop import Trainer

_SLOW = 1.25
"""As many times the median of all ranks; what differs less is noise."""
_DATA_SHARE = 0.1
"""Of the step that one rank waits for data longer than most do."""
_IN_A_ROW = 3
"""Records that say the same, before somebody is told."""
_MOST_TIMED = 64


@HOOKS.register("stragglers")
class Stragglers(Hook):
    """The slowest rank in each record; one that stays slow is told once, on the console and in the run's ledger."""

    def __init__(self, trainer: "Trainer") -> None:
        super().__init__(trainer)
        self.world, self.on_gpu = trainer.world, trainer.world.device.type == "cuda"
        self._data_wait, self._steps = 0.0, 0
        self._timed: deque[tuple[Any, Any]] = deque(maxlen=_MOST_TIMED)
        self._began: Any = None
        if self.world.size == 1:
            return
        self._names = [f"{device.replace('cpu', 'CPU')} on {host}" for host, device in self.world.places]
        self._in_a_row: Counter[tuple[str, int]] = Counter()
        blocks = list(trainer.model.layers.children())
        block = blocks[len(blocks) // 2]
        # Between FSDP's own hooks, so that no collective is inside; and not a part of the compiled block.
        block.register_forward_pre_hook(torch._dynamo.disable(self._begin))
        block.register_forward_hook(torch._dynamo.disable(self._end), prepend=True)

    def _now(self) -> Any:
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _begin(self, block: nn.Module, inputs: object) -> None:
        self._began = self._now() if torch.is_grad_enabled() else None

    def _end(self, block: nn.Module, inputs: object, outputs: object) -> None:
        if self._began is not None:
            self._timed.append((self._began, self._now()))

    def after_step(self, step: Step, taken: bool) -> None:
        self._data_wait += step.data_wait_seconds
        self._steps += 1

    def record(self) -> dict[str, float]:
        if self.world.size == 1:
            return {}
        if self.on_gpu:
            torch.cuda.synchronize()  # the record of the loss has waited already
        seconds = [a.elapsed_time(b) / 1000 if self.on_gpu else b - a for a, b in self._timed]
        table = torch.zeros(self.world.size, 2, dtype=torch.float64)
        table[self.world.rank] = torch.tensor([mean(seconds), self._data_wait / self._steps])
        dist.all_reduce(table, group=self.world.cpu_group)
        self._timed.clear()
        self._data_wait, self._steps = 0.0, 0
        compute, self._waits = table.T.tolist()
        usual = median_low(compute)
        self._ratios = [c / usual for c in compute]
        slowest = max(range(self.world.size), key=compute.__getitem__)
        waiting = max(range(self.world.size), key=self._waits.__getitem__)
        return {"slowest_rank": slowest, "slowest_rank_ratio": self._ratios[slowest], "data_wait_rank": waiting}

    def at_record(self, record: dict[str, Any]) -> None:
        if "slowest_rank" not in record or "step_seconds" not in record:
            return
        usual = median_low(self._waits)
        for rank, (ratio, wait) in enumerate(zip(self._ratios, self._waits)):
            share = (wait - usual) / record["step_seconds"]
            slow = f"computes {ratio:.2f} times as long as the median of {self.world.size} ranks"
            late = f"waits for data {share:.0%} of a step longer than the median of {self.world.size} ranks"
            self._judge("compute", rank, ratio >= _SLOW, slow)
            self._judge("data", rank, share >= _DATA_SHARE, late)

    def _judge(self, what: str, rank: int, is_slow: bool, sentence: str) -> None:
        seen = self._in_a_row[what, rank] = self._in_a_row[what, rank] + 1 if is_slow else 0
        if seen == _IN_A_ROW:
            look = "its clock, its temperature and what else runs there" if what == "compute" else "its disk or network"
            self.trainer.warn(f"rank {rank} ({self._names[rank]}) {sentence}, and all wait for it: look at {look}")
            where = {"step": self.trainer.step, "tokens": self.trainer.tokens}
            self.trainer.run.append_ledger("straggler", rank=rank, name=self._names[rank], why=sentence, **where)
