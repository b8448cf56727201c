"""What a run reports about itself: sums are kept on the device and read only at log steps."""

import resource
import time

import torch

from train.distributed import World


class Metrics:
    """Averages since the last log step."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.reset()

    def reset(self) -> None:
        self.loss_sum = torch.zeros((), device=self.world.device)
        self.grad_norm_sum = torch.zeros((), device=self.world.device)
        self.steps = 0
        self.data_wait_seconds = 0.0
        self.started = time.perf_counter()

    def add(self, loss: torch.Tensor, grad_norm: torch.Tensor) -> None:
        """Add this rank's share of the step's mean loss, in nats a token, and the global gradient norm."""
        self.loss_sum += loss.detach()
        self.grad_norm_sum += grad_norm.detach()
        self.steps += 1

    def read(self, tokens: int, lr: float) -> dict[str, float]:
        """The averages over all ranks, as a record; then start anew.

        Args:
            tokens: tokens of all ranks since the last call.
        """
        loss = self.world.sum(self.loss_sum) / self.steps  # waits for the device, so the time below is true
        seconds = time.perf_counter() - self.started
        record = {
            "loss": loss.item(),
            "lr": lr,
            "grad_norm": (self.grad_norm_sum / self.steps).item(),
            "tokens_per_second": tokens / seconds,
            "tokens_per_second_per_process": tokens / seconds / self.world.size,
            "data_wait_fraction": self.data_wait_seconds / seconds,
            "memory_bytes": memory_bytes(self.world.device),
        }
        self.reset()
        return record


def memory_bytes(device: torch.device) -> int:
    """Peak memory of this process: allocated on the GPU, or resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
