"""An optimizer step of the real trainer on pretended ranks, without memory or time: what it keeps, sends and waits for.

    python tests/train/traced_step.py pretrain_7b [--processes 1 2 8 64 256] [--explain] [key=value ...]

Tensors have shapes and no values (FakeTensorMode), and rank 0 is alone in a process group that pretends to have the
others. Everything else is the trainer's own: model, FSDP2, autograd, loss, clipping, hooks, optimizer. The tensors are
a CPU's, whose kernels keep what those of a GPU keep. But RMSNorm is many small operations there: LayerNorm stands in.
"""

import argparse
import contextlib
import gc
import io
import math
import sys
import tempfile
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).parents[1]))  # of the tests; before it the project, whose `train` this isn't
sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
import torch.distributed as dist
from small_run import write_dataset
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from openlm_pipeline.errors import ConfigError
from openlm_pipeline.experiments import Experiment, load_experiment
from openlm_pipeline.models import attention
from openlm_pipeline.models.transformer import Transformer
from openlm_pipeline.runs.estimates import estimate_memory
from openlm_pipeline.runs.folder import RunFolder
from openlm_pipeline.runs.identity import run_identity
from openlm_pipeline.runs.layout import layout
from openlm_pipeline.runs.traffic import estimate_traffic
from openlm_pipeline.shards.opening import open_dataset
from openlm_pipeline.storage.home import Home
from train import parallel
from train.distributed import World, leave_process_group
from train.loop import Trainer

PER_NODE = 8
_WAITS = ("aten::_local_scalar_dense", "aten::is_nonzero")
"""What makes the CPU wait for a GPU's value."""
_GATHERS, _REDUCES = ("c10d::_allgather_base_",), ("c10d::_reduce_scatter_base_", "c10d::allreduce_")


class Ledger(TorchDispatchMode):
    """Bytes of all storages that are alive after each operation, collectives, and operations that wait."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.peak = 0
        self.collectives: Counter[str] = Counter()
        self.communicated: Counter[str] = Counter()
        """Bytes by collective: of the larger of what goes in and what comes out."""
        self.waits: Counter[str] = Counter()
        self.explain_from: float | None = None
        """Bytes from which on to make `explanation`, once."""
        self.explanation: Counter[str] = Counter()
        """Bytes by operation, shape and type of what was alive then."""
        self._alive: WeakIdKeyDictionary = WeakIdKeyDictionary()

    def add(self, tensor: Any, operation: str) -> None:
        if isinstance(tensor, torch.Tensor) and not hasattr(tensor, "to_local"):
            storage = tensor.untyped_storage()
            if storage not in self._alive:
                entry = [storage.nbytes(), f"{operation} {tuple(tensor.shape)} {tensor.dtype}"]
                self._alive[storage] = entry
                self.bytes += entry[0]
                weakref.finalize(storage, self._resize, entry, 0)

    def _resize(self, entry: list[Any], size: int) -> None:
        self.bytes += size - entry[0]
        entry[0] = size

    @contextmanager
    def watching(self) -> Iterator[None]:
        """FSDP frees what it gathered by giving its storage no size, which is no operation."""
        resize = torch.UntypedStorage.resize_

        def counted(storage: torch.UntypedStorage, size: int) -> Any:
            if storage in self._alive:
                self._resize(self._alive[storage], size)
                self._look()
            return resize(storage, size)

        with patch.object(torch.UntypedStorage, "resize_", counted), self:
            yield

    def _look(self) -> None:
        self.peak = max(self.peak, self.bytes)
        if self.explain_from is not None and self.bytes >= self.explain_from and not self.explanation:
            for size, made_by in self._alive.values():
                self.explanation[made_by] += size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.name()
        for tensor in tree_leaves(result):
            self.add(tensor, name)
        self._look()
        if name in _GATHERS + _REDUCES:
            self.collectives[name] += 1
            tensors = [t for t in tree_leaves(args) if isinstance(t, torch.Tensor)]
            self.communicated[name] += max(t.numel() * t.element_size() for t in tensors)
        if name.startswith(_WAITS):
            self.waits[name] += 1
        return result


class Alone(World):
    """Rank 0, which agrees with itself."""

    def any(self, flag: bool) -> bool:
        return flag

    def from_rank0(self, make: Callable[[], Any]) -> Any:
        return make()

    def of_all(self, value: Any) -> list[Any]:
        return [value]


def real(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, whose tensors have values."""

    def called(*args: Any) -> Any:
        with unset_fake_temporarily():
            return function(*args)

    return called


def cast(model: nn.Module, dtype: torch.dtype) -> None:
    """`model.to(dtype)`, which pretended tensors can't be swapped for."""
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            module.register_parameter(name, nn.Parameter(parameter.to(dtype)))


@dataclass(frozen=True)
class Traced:
    """What a step did, in bytes."""

    peak: int
    gathered: int
    reduced: int
    collectives: Counter[str]
    waits: Counter[str]
    explanation: Counter[str]


def trace(experiment: Experiment, processes: int, explain: bool = False) -> Traced:
    """A step of rank 0 of so many on machines of `PER_NODE`, when the optimizer has its state."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=processes)
    ledger = Ledger()
    try:
        with (
            tempfile.TemporaryDirectory() as root,
            patch.object(dist, "new_group", lambda *args, **kwargs: dist.group.WORLD),
            patch.object(parallel, "make_mesh", real(parallel.make_mesh)),
            patch.object(Transformer, "to", cast),
            patch.object(attention, "_CPU_HEAD_DIM", 1),
            patch.object(nn, "RMSNorm", partial(nn.LayerNorm, bias=False)),  # which keeps what a fused RMSNorm does
            contextlib.redirect_stdout(io.StringIO()),
            FakeTensorMode(allow_non_fake_inputs=True),
        ):
            home = Home(Path(root))
            for dataset in experiment.datasets():
                write_dataset(home, dataset.name, 64, seed=0, seq_len=experiment.seq_len)
            datasets = [open_dataset(d, home) for d in experiment.training_datasets()]
            versions = {d.name: opened.version for d, opened in zip(experiment.training_datasets(), datasets)}
            run = RunFolder(home.run(experiment.name, experiment.version))
            run.claim(experiment, run_identity(experiment, versions))
            world = Alone(0, processes, torch.device("cpu"), min(PER_NODE, processes), dist.group.WORLD)
            trainer = Trainer(experiment, home, world, datasets)
            for hook in trainer.hooks:
                hook.at_resume()
            batch = torch.randint(0, 128, (trainer.batches.local_sequences, experiment.seq_len + 1))
            for parameter in trainer.model.parameters():  # for the optimizer's state
                parameter.grad = torch.zeros_like(parameter)
            trainer.optimizer.step()
            trainer.optimizer.zero_grad()
            gc.collect()
            for tensor in (*trainer.model.parameters(), *trainer.model.buffers(), *_states(trainer), batch):
                ledger.add(tensor.to_local() if hasattr(tensor, "to_local") else tensor, "kept between steps")
            with ledger.watching():
                trainer._optimizer_step(batch, 0.0)
            collectives, communicated = Counter(ledger.collectives), Counter(ledger.communicated)
            if explain:
                ledger.explain_from = 0.9999 * ledger.peak
                with ledger.watching():
                    trainer._optimizer_step(batch, 0.0)
            trainer.close()
    finally:
        leave_process_group()
    gathered, reduced = (sum(communicated[name] for name in names) for names in (_GATHERS, _REDUCES))
    return Traced(ledger.peak, gathered, reduced, collectives, ledger.waits, ledger.explanation)


def _states(trainer: Trainer) -> Iterator[torch.Tensor]:
    for part in trainer.optimizer:
        for state in part.state.values():
            yield from (v for v in state.values() if isinstance(v, torch.Tensor))
    for extra in trainer.hooks.state().values():
        yield from extra.values()


def shortened(recipe: str, processes: int, *overrides: str) -> Experiment:
    """The recipe with a batch of at most two micro-batches per process, as the third does what the second did."""
    experiment = load_experiment(recipe, overrides)
    laid = layout(experiment, processes, min(PER_NODE, processes))
    sequences = min(2, laid.micro_batches) * laid.micro_batch * processes
    laid_out = [f"execution.micro_batch={laid.micro_batch}", f"execution.replicas={laid.replicas}"]
    batch = f"training.global_batch={sequences * experiment.seq_len}"
    return load_experiment(recipe, [*overrides, *laid_out, batch, "execution.compile=false"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("recipes", nargs="+", metavar="RECIPE or key=value")
    parser.add_argument("--processes", nargs="+", type=int, default=[1, 2, 8, 64, 256])
    parser.add_argument("--explain", action="store_true", help="list what is alive at the peak")
    arguments = parser.parse_args()
    overrides = [a for a in arguments.recipes if "=" in a]
    print("| recipe | processes | layout | peak, GiB | dry run | gathers, GB | reduces, GB | traced in |")
    print("|---|---|---|---|---|---|---|---|")
    for recipe in (a for a in arguments.recipes if "=" not in a):
        for processes in arguments.processes:
            per_node, began = min(PER_NODE, processes), time.perf_counter()
            try:
                laid = layout(load_experiment(recipe, overrides), processes, per_node)
            except ConfigError as e:
                print(f"| {recipe} | {processes} | refused: {e} | | | | | |")
                continue
            experiment = shortened(recipe, processes, *overrides)
            found, memory = trace(experiment, processes, arguments.explain), estimate_memory(experiment, processes)
            traffic = estimate_traffic(experiment, processes)
            assert not found.waits
            for traced, said in ((found.gathered, traffic.gathered), (found.reduced, traffic.reduced)):
                assert math.isclose(traced, said, rel_tol=1e-3), (found, traffic)
            whole = estimate_traffic(load_experiment(recipe, overrides), processes, per_node)
            shape = f"{laid.micro_batches} x {laid.micro_batch}" + f", {laid.replicas} groups" * (laid.replicas > 1)
            print(
                f"| {recipe} | {processes} | {shape} | {found.peak / 2**30:.2f} | {memory.total / found.peak - 1:+.1%} "
                f"| {whole.gathered / 1e9:.2f} | {whole.reduced / 1e9:.2f} | {time.perf_counter() - began:.1f} s |"
            )
            for made_by, size in found.explanation.most_common(30):
                print(f"{size / 2**20:12.1f} MiB  {made_by}")


if __name__ == "__main__":
    main()
