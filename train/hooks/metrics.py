"""What a run reports about itself: sums are kept on the device and read only at log steps."""

import resource
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from openlm_pipeline.runs.estimates import Arithmetic, find_device, flops_per_token, peak_flops
from openlm_pipeline.units import format_bytes
from train.hooks import HOOKS, Hook, Step

if TYPE_CHECKING:
    from train.loop import Trainer


@HOOKS.register("metrics")
class Metrics(Hook):
    """Averages since the last record: loss, gradient norm, speed, memory, waiting for data."""

    order = 40

    def __init__(self, trainer: "Trainer") -> None:
        super().__init__(trainer)
        experiment, self.world = trainer.experiment, trainer.world
        self.global_batch = experiment.training.global_batch
        self.flops_per_token = flops_per_token(experiment.model_config_resolved(), experiment.seq_len)
        self.peak_flops = _peak_flops(self.world.device, experiment.training.precision, trainer.warn)

    def at_resume(self) -> None:
        self.loss_sum = torch.zeros((), device=self.world.device)
        self.grad_norm_sum = torch.zeros((), device=self.world.device)
        self.num_targets: torch.Tensor | int = 0
        self.first_step, self.steps_taken, self.lr = self.trainer.step, 0, 0.0
        self.data_wait_seconds = 0.0
        self.paused_before = self.trainer.hooks.paused_seconds
        self.started = time.perf_counter()

    def after_step(self, step: Step, taken: bool) -> None:
        self.lr = step.lr
        self.data_wait_seconds += step.data_wait_seconds
        if taken:
            self.loss_sum += step.loss.detach()
            self.grad_norm_sum += step.grad_norm.detach()
            self.num_targets = self.num_targets + step.num_targets
            self.steps_taken += 1

    def record(self) -> dict[str, float | None]:
        """The averages over all ranks, from which on they are new ones; empty where every step was left out.

        Where ranks differ, in memory and in waiting for data, the record has the largest value.
        """
        if not self.steps_taken:
            return {}
        steps = self.trainer.step - self.first_step
        loss = (self.world.sum(self.loss_sum) / self.steps_taken).item()  # waits for the device: the time below is true
        grad_norm = (self.grad_norm_sum / self.steps_taken).item()
        seconds = time.perf_counter() - self.started - (self.trainer.hooks.paused_seconds - self.paused_before)
        worst = torch.tensor([self.data_wait_seconds, *memory_bytes(self.world.device)], dtype=torch.float64)
        dist.all_reduce(worst, op=dist.ReduceOp.MAX, group=self.world.cpu_group)
        data_wait_seconds, allocated, reserved = worst.tolist()
        tokens = steps * self.global_batch
        tokens_per_second_per_gpu = tokens / seconds / self.world.size
        flops_per_second_per_gpu = tokens_per_second_per_gpu * self.flops_per_token
        record = {
            "loss": loss,
            "lr": self.lr,
            "grad_norm": grad_norm,
            "tokens_per_second": tokens / seconds,
            "tokens_per_second_per_gpu": tokens_per_second_per_gpu,
            "flops_per_second_per_gpu": flops_per_second_per_gpu,
            "mfu": flops_per_second_per_gpu / self.peak_flops if self.peak_flops else None,
            "step_seconds": seconds / steps,
            "data_wait_seconds": data_wait_seconds / steps,
            "data_wait_fraction": data_wait_seconds / seconds,
            "wasted_token_fraction": 1 - int(self.num_targets) / tokens,
            "memory_bytes": int(allocated),
            "memory_reserved_bytes": int(reserved),
        }
        if steps > self.steps_taken:
            record["skipped_steps"] = steps - self.steps_taken
        self.at_resume()
        return record


def console_text(record: dict[str, float | None]) -> str:
    """What the console shows of a record."""
    parts = [
        f"loss {record['loss']:.4f}",
        f"lr {record['lr']:.2e}",
        f"grad norm {record['grad_norm']:.2f}",
        f"{record['tokens_per_second']:,.0f} tokens/s",
        *([] if record["mfu"] is None else [f"MFU {record['mfu']:.1%}"]),
        format_bytes(record["memory_bytes"]),
        f"data wait {record['data_wait_fraction']:.1%}",
        *([f"{record['skipped_steps']} steps left out"] if "skipped_steps" in record else []),
    ]
    return "  ".join(parts)


def memory_bytes(device: torch.device) -> tuple[int, int]:
    """Peak memory of this process: (allocated, reserved) on the GPU; on a CPU what was resident, twice."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return resident, resident


def _peak_flops(device: torch.device, precision: str, note: Callable[[str], None]) -> float | None:
    """What MFU is measured by; None on a CPU, and on a GPU that is not in the table."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    arithmetic = device_arithmetic(precision)
    peak = peak_flops(name, arithmetic)
    if peak is None:
        known = find_device(name)
        reason = f"{known.name} has no {arithmetic}" if known else f"no peak is known for the device {name!r}"
        note(f"mfu is null in the metrics: {reason}")
    return peak


def device_arithmetic(precision: str) -> Arithmetic:
    """What a GPU computes matrix products in at a recipe's `training.precision`, as torch is set now."""
    if precision == "bf16":
        return "bf16"
    return "fp32" if torch.get_float32_matmul_precision() == "highest" else "tf32"
