"""The process group, the device of this rank, and how ranks agree."""

import os
import resource
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from openlm_pipeline.errors import DataError

FIRST_STEP_TIMEOUT = timedelta(minutes=30)
"""A collective may take so long until the first step is made: meanwhile ranks hash checkpoints and compile kernels."""


@dataclass(frozen=True)
class World:
    """This process among all."""

    rank: int
    size: int
    device: torch.device
    per_node: int
    """Processes on this machine."""
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

    def first_error(self, check: Callable[[], None]) -> DataError | None:
        """Call `check()` on every rank; on every rank the error of the first that had one."""
        mine = None
        try:
            check()
        except DataError as e:
            mine = e
        return next((error for error in self.of_all(mine) if error), None)

    @cached_property
    def places(self) -> list[tuple[str, str]]:
        """Host and device of each rank. Ranks ask for them alike, as they are gathered then."""
        device = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu"
        return self.of_all((socket.gethostname(), device))

    def of_all(self, value: Any) -> list[Any]:
        """What each rank gave, by rank; nothing large."""
        found = [value] * self.size
        dist.all_gather_object(found, value, group=self.cpu_group)
        return found

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


def raise_file_limit() -> None:
    """As many open files as the system allows this process: shards, sockets and compiled kernels are many."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = min(hard, 10_240) if sys.platform == "darwin" else hard  # OPEN_MAX; macOS refuses what it calls unlimited
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def stay_near_gpu(gpu: Any, devices: Path = Path("/sys/bus/pci/devices")) -> None:
    """Run this thread, and those that it starts, on the CPUs of the NUMA node of its GPU, of those that it may use.

    torchrun's `--numa-binding` ends a run without the program `numactl`; this does nothing where nothing is known.

    Args:
        gpu: its properties, as torch gives them.
        devices: where Linux describes PCI devices.
    """
    near = devices / f"{gpu.pci_domain_id:04x}:{gpu.pci_bus_id:02x}:{gpu.pci_device_id:02x}.0" / "local_cpulist"
    if near.exists() and (listed := near.read_text().strip()):
        ranges = [part.split("-") for part in listed.split(",")]  # such as 0-15,64-79
        cpus = {cpu for ends in ranges for cpu in range(int(ends[0]), int(ends[-1]) + 1)} & os.sched_getaffinity(0)
        if cpus:
            os.sched_setaffinity(0, cpus)


def start() -> World:
    """Join the process group torchrun describes, or make one of a single process."""
    size = int(os.environ.get("WORLD_SIZE", 1))
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        stay_near_gpu(torch.cuda.get_device_properties())
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    if "RANK" in os.environ:
        store, rank, _ = next(dist.rendezvous("env://"))
        if os.environ.get("GROUP_WORLD_SIZE") == "1":
            # Workers that one torchrun starts again find its store with the addresses of those that died.
            store = dist.PrefixStore(f"attempt-{os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
        dist.init_process_group(
            backend,
            store=store,
            rank=rank,
            world_size=size,
            timeout=FIRST_STEP_TIMEOUT,
            device_id=torch.device("cuda", torch.cuda.current_device()) if cuda else None,
        )
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
    per_node = int(os.environ.get("LOCAL_WORLD_SIZE", size))
    return World(dist.get_rank(), size, device, per_node, dist.new_group(backend="gloo"))


def leave_process_group() -> None:
    """The end of what `start` began; nothing where it did not get that far."""
    if dist.is_initialized():
        dist.destroy_process_group()
