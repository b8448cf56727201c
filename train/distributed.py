"""The process group, the device of this rank, and the sharded model."""

import os
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from openlm_pipeline.experiments import Experiment
from openlm_pipeline.models.init import initialize
from openlm_pipeline.models.transformer import Transformer


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
        dist.init_process_group(backend)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
    return World(dist.get_rank(), size, device, dist.new_group(backend="gloo"))


def leave_process_group() -> None:
    """The end of what `start` began; nothing where it did not get that far."""
    if dist.is_initialized():
        dist.destroy_process_group()


def build_model(experiment: Experiment, world: World) -> Transformer:
    """The experiment's model, sharded over all ranks by block and initialised from its seed."""
    mesh = init_device_mesh(world.device.type, (world.size,), mesh_dim_names=("shard",))
    policy = MixedPrecisionPolicy(reduce_dtype=torch.float32)
    if experiment.training.precision == "bf16":
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    config = experiment.model_config_resolved()
    with torch.device("meta"):
        model = Transformer(config)
    for layer in model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    model.to_empty(device=world.device)
    initialize(model, config, experiment.seed)
    return model
