"""Saving and loading of a run's state with torch's distributed checkpoint (DCP), by every rank at once.

A save copies the state to the CPU, which is all that training waits for, and is written, hashed and committed in a
thread. One save is under way at a time. Until it is committed the checkpoints before it are all that counts, and what
goes wrong is raised on every rank by the next `wait`.
"""

import shutil
import time
import uuid
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.optim import Optimizer

from openlm_pipeline.checkpoints.folders import (
    MODEL_CONFIG,
    Checkpoint,
    clear_unfinished,
    commit,
    describe_file,
    unfinished,
)
from openlm_pipeline.checkpoints.reading import SafePlanner, SafeReader
from openlm_pipeline.checkpoints.weights_digest import Part, digest_of_parts, local_part
from openlm_pipeline.errors import DataError, TrainingError
from openlm_pipeline.models.init import parameter_name
from openlm_pipeline.models.transformer import Transformer
from openlm_pipeline.storage.files import write_json
from openlm_pipeline.waits import waiting_for
from train.distributed import World
from train.optimizers import Optimizers

Extra = dict[str, dict[str, Tensor]]
"""More named state dicts that are saved beside those of model and optimizer, such as averages of the weights."""


@dataclass(frozen=True)
class Saved:
    """A checkpoint that was made just now."""

    checkpoint: Checkpoint
    stall_seconds: float
    """Time that training waited: for the save before it, and for the copy of the state."""
    write_seconds: float
    """Time until it was complete on disk, from then on."""


@dataclass(frozen=True)
class _Described:
    """What one rank says of its part of a checkpoint."""

    files: dict[str, dict[str, Any]]
    """`describe_file` of those it wrote."""
    weights: dict[str, Part]


def _state(model: Transformer, optimizer: Optimizer, extra: Extra) -> dict[str, object]:
    model_state, optimizer_state = get_state_dict(model, optimizer)
    return {"model": model_state, "optimizer": optimizer_state, **extra}


def _reason(error: BaseException) -> str:
    """The first cause in what DCP raises, which holds one error a rank."""
    if isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    return str(error).strip() or type(error).__name__


class _Planner(DefaultSavePlanner):
    """DCP's planner, which keeps the plan of the save before for as long as names, shapes and shards are the same.

    Making it takes rank 0 seconds where ranks are many, beside training.
    """

    def __init__(self, kept_under: str) -> None:
        super().__init__(enable_plan_caching=True)
        self._cached_plans_key = kept_under  # torch keeps one per class and process, whatever the ranks in it


class Saver:
    """Makes the checkpoints of a run. Every rank has one, and calls its methods at the same steps."""

    def __init__(
        self,
        folder: Path,
        run_fingerprint: str,
        world: World,
        *,
        asynchronous: bool,
        on_written: Callable[[], None],
        on_saved: Callable[[Saved], None],
    ) -> None:
        """
        Args:
            folder: the run's `checkpoints`.
            on_written: called on rank 0 before a checkpoint that is written counts.
            on_saved: called on rank 0 after each checkpoint, in the thread that wrote it.
        """
        self.folder, self.run_fingerprint = folder, run_fingerprint
        self.on_written, self.on_saved = on_written, on_saved
        # A group of its own: the training loop uses the other one at the same time.
        self.world = replace(world, cpu_group=dist.new_group(backend="gloo"))
        self._plan_key = uuid.uuid4().hex
        self._in_flight: Future[None] | None = None
        self._pool: ThreadPoolExecutor | None = None
        if asynchronous:
            cuda = world.device.type == "cuda"
            self._stager = DefaultStager(
                StagingOptions(
                    use_pinned_memory=cuda, use_shared_memory=False, use_async_staging=False, use_non_blocking_copy=cuda
                )
            )
            # DCP makes a stream on the current device, which in a new thread would be another rank's.
            device = (torch.cuda.set_device, (world.device,)) if cuda else (None, ())
            self._pool = ThreadPoolExecutor(1, "checkpoint", initializer=device[0], initargs=device[1])

    def close(self, warn: Callable[[str], None]) -> None:
        """Let the save under way end; for the end of a run, where its error must not hide another one."""
        try:
            self.wait()
        except TrainingError as e:
            warn(str(e))
        if self._pool is not None:
            self._pool.shutdown()
            self._stager.close()

    @property
    def failed(self) -> bool:
        """Whether the save under way has ended with an error, which `wait` raises."""
        return self._in_flight is not None and self._in_flight.done() and self._in_flight.exception() is not None

    def wait(self) -> None:
        """Return when no save is under way.

        Raises:
            TrainingError: the last one went wrong; the checkpoints before it are as they were.
        """
        if self._in_flight is not None:
            in_flight, self._in_flight = self._in_flight, None
            with waiting_for(f"a checkpoint to be written to {self.folder}"):
                in_flight.result()

    def save(
        self,
        model: Transformer,
        optimizer: Optimizer,
        extra: Extra,
        *,
        step: int,
        tokens: int,
        milestone: str | None,
        before_milestone: str | None,
        metrics: dict[str, float],
    ) -> None:
        """Begin a checkpoint; with `asynchronous` it is complete when `wait` returns, without it when this returns.

        Raises:
            TrainingError: this save, or the one before, could not be written.
        """
        began = time.perf_counter()
        self.wait()
        state = _state(model, optimizer, extra)
        config, tmp = model.config.model_dump(), unfinished(self.folder, step)
        parameters = [parameter_name(name) for name, _ in model.named_parameters()]

        def finish(found: list[_Described | Exception]) -> None:
            files: dict[str, dict[str, Any]] = {}
            for described in found:
                if isinstance(described, Exception):
                    raise described
                files |= described.files
            digest = digest_of_parts(described.weights for described in found)
            write_json(tmp / MODEL_CONFIG, config)
            self.on_written()
            of = self.run_fingerprint, step, tokens, milestone
            made = commit(tmp, *of, metrics, files, digest, before_milestone)
            seconds = time.perf_counter() - began
            stall = seconds if self._pool is None else staged - began
            self.on_saved(Saved(made, stall, seconds - stall))

        def write() -> None:
            try:
                self.world.from_rank0(lambda: clear_unfinished(self.folder))
                planner = _Planner(self._plan_key)
                dcp.save(state, checkpoint_id=tmp, process_group=self.world.cpu_group, planner=planner)
                found = self._describe(tmp, {name: state["model"][name] for name in parameters})
                self.world.from_rank0(lambda: finish(found))
            except (CheckpointException, OSError, RuntimeError) as e:
                if self.world.rank == 0:
                    shutil.rmtree(tmp, ignore_errors=True)  # so that a full disk has room again
                raise TrainingError(
                    f"the checkpoint of step {step} could not be written to {tmp}: {_reason(e)}. The checkpoints "
                    "before it are untouched; make sure that there is room and that the folder can be written, and "
                    "start the run again"
                ) from e

        if self._pool is None:
            write()
        else:
            state = self._stager.stage(state)
            staged = time.perf_counter()
            self._in_flight = self._pool.submit(write)

    def _describe(self, tmp: Path, parameters: dict[str, Tensor]) -> list[_Described | Exception]:
        """On rank 0 what every rank says of what it wrote, or why it cannot; elsewhere nothing."""
        mine: _Described | Exception
        try:
            files = {p.name: describe_file(p) for p in tmp.glob(f"__{self.world.rank}_*.distcp")}
            mine = _Described(files, {name: local_part(value) for name, value in parameters.items()})
        except Exception as e:  # noqa: BLE001 - raised by rank 0, on every rank
            mine = e
        found: list[Any] | None = [None] * self.world.size if self.world.rank == 0 else None
        dist.gather_object(mine, found, dst=0, group=self.world.cpu_group)
        return found or []


@contextmanager
def _being_read(checkpoint: Checkpoint) -> Iterator[None]:
    """
    Raises:
        DataError: what DCP could not read.
    """
    try:
        yield
    except CheckpointException as e:
        raise DataError(f"{checkpoint.path} was verified, but can't be loaded: {_reason(e)}") from e


def load(
    checkpoint: Checkpoint, model: Transformer, optimizer: Optimizers, extra: Extra, optional: Collection[str] = ()
) -> Collection[str]:
    """Load a verified checkpoint into model, optimizer and the tensors of `extra`, whatever world size saved it.

    The optimizer keeps its own settings, such as weight decay.

    Args:
        optional: names of the states in `extra` that it need not have.

    Returns:
        Names of the states in `extra` that were loaded.
    """
    reader = SafeReader(checkpoint.path)
    saved = reader.read_metadata().state_dict_metadata
    absent = {name for name in optional if not any(key.startswith(f"{name}.") for key in saved)}
    extra = {name: state for name, state in extra.items() if name not in absent}
    own = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    state = _state(model, optimizer, extra)
    with _being_read(checkpoint):
        dcp.load(state, storage_reader=reader, planner=SafePlanner())
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    for group, settings in zip(optimizer.param_groups, own):
        group.update(settings)
    return extra.keys()


def load_weights(checkpoint: Checkpoint, model: Transformer) -> None:
    """Load the model alone from a verified checkpoint."""
    state = {"model": get_model_state_dict(model)}
    with _being_read(checkpoint):
        dcp.load(state, storage_reader=SafeReader(checkpoint.path), planner=SafePlanner())
    set_model_state_dict(model, state["model"])
