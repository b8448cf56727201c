"""The process group, the device of this rank, and how ranks agree."""

import os
from dataclasses import dataclass

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class World:
    """This process among all."""

    rank: int
    size: int
    device: torch.device
    cpu_group: dist.ProcessGroup
    """A gloo group, so that small agreements never wait for the GPU's stream."""

    def any(self, flag: bool) -> bool:
        """True on every rank if `flag` is true on one."""
        value = torch.tensor(int(flag))
        dist.all_reduce(value, op=dist.ReduceOp.MAX, group=self.cpu_group)
        return bool(value.item())

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        dist.all_reduce(values)
        return values

    def from_rank0(self, make):
        """Call `make()` on rank 0 and give its result, or raise its error, on every rank."""
        box = [None, None]
        if self.rank == 0:
            try:
                box[0] = make()
            except Exception as e:  # noqa: BLE001 - raised again below, on every rank
                box[1] = e
        dist.broadcast_object_list(box, src=0, group=self.cpu_group)
        if box[1] is not None:
            raise box[1]
        return box[0]


def start() -> World:
    """Join the process group torchrun describes, or make one of a single process."""
    size = int(os.environ.get("WORLD_SIZE", 1))
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    if "RANK" in os.environ:
        store, rank, _ = next(dist.rendezvous("env://"))
        if os.environ.get("GROUP_WORLD_SIZE") == "1":
            # Workers that one torchrun starts again find its store with the addresses of those that died.
            store = dist.PrefixStore(f"attempt-{os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
    return World(dist.get_rank(), size, device, dist.new_group(backend="gloo"))


def leave_process_group() -> None:
    """The end of what `start` began; nothing where it did not get that far."""
    if dist.is_initialized():
        dist.destroy_process_group()
