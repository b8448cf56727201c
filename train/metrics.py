"""What a run reports about itself: sums are kept on the device and read only at log steps."""

import contextlib
import resource
import time
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist

from openlm_pipeline.experiments import Experiment
from openlm_pipeline.runs.estimates import Arithmetic, find_device, flops_per_token, peak_flops
from openlm_pipeline.units import format_bytes
from train.distributed import World


class Metrics:
    """Averages since the last log step."""

    def __init__(self, world: World, experiment: Experiment, note: Callable[[str], None]) -> None:
        """
        Args:
            note: told once where MFU cannot be given.
        """
        self.world = world
        self.global_batch = experiment.training.global_batch
        self.flops_per_token = flops_per_token(experiment.model_config_resolved(), experiment.seq_len)
        self.peak_flops = _peak_flops(world.device, experiment.training.precision, note)
        self.reset()

    def reset(self) -> None:
        self.loss_sum = torch.zeros((), device=self.world.device)
        self.grad_norm_sum = torch.zeros((), device=self.world.device)
        self.steps = 0
        self.data_wait_seconds = 0.0
        self.paused_seconds = 0.0
        self.started = time.perf_counter()

    def add(self, loss: torch.Tensor, grad_norm: torch.Tensor) -> None:
        """Add this rank's share of the step's mean loss, in nats a token, and the global gradient norm."""
        self.loss_sum += loss.detach()
        self.grad_norm_sum += grad_norm.detach()
        self.steps += 1

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """What is done inside, such as a validation, is no part of the time of the steps around it."""
        started = time.perf_counter()
        yield
        self.paused_seconds += time.perf_counter() - started

    def read(self, steps: int, lr: float) -> dict[str, float | None]:
        """The averages over all ranks, as a record; then start anew.

        Where ranks differ, in memory and in waiting for data, the record has the largest value.

        Args:
            steps: optimizer steps since the last call, with those that were left out.
        """
        loss = (self.world.sum(self.loss_sum) / self.steps).item()  # waits for the device, so the time below is true
        grad_norm = (self.grad_norm_sum / self.steps).item()
        seconds = time.perf_counter() - self.started - self.paused_seconds
        worst = torch.tensor([self.data_wait_seconds, *memory_bytes(self.world.device)], dtype=torch.float64)
        dist.all_reduce(worst, op=dist.ReduceOp.MAX, group=self.world.cpu_group)
        data_wait_seconds, allocated, reserved = worst.tolist()
        tokens = steps * self.global_batch
        tokens_per_second_per_gpu = tokens / seconds / self.world.size
        flops_per_second_per_gpu = tokens_per_second_per_gpu * self.flops_per_token
        record = {
            "loss": loss,
            "lr": lr,
            "grad_norm": grad_norm,
            "tokens_per_second": tokens / seconds,
            "tokens_per_second_per_gpu": tokens_per_second_per_gpu,
            "flops_per_second_per_gpu": flops_per_second_per_gpu,
            "mfu": flops_per_second_per_gpu / self.peak_flops if self.peak_flops else None,
            "step_seconds": seconds / steps,
            "data_wait_seconds": data_wait_seconds / steps,
            "data_wait_fraction": data_wait_seconds / seconds,
            "memory_bytes": int(allocated),
            "memory_reserved_bytes": int(reserved),
        }
        if steps > self.steps:
            record["skipped_steps"] = steps - self.steps
        self.reset()
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
