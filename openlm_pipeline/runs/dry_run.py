"""What training a recipe would take, before anything is trained: arithmetic on the recipe and a look at the shards.

Neither a GPU nor any data has to be there. `describe` gives numbers; `TrainingCost.lines` says them to people.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from openlm_pipeline.errors import ConfigError, DataError, MissingInputError
from openlm_pipeline.experiments import Dataset, Experiment
from openlm_pipeline.experiments.choices import unread_settings
from openlm_pipeline.models import count_parameters
from openlm_pipeline.models.config import ModelConfig
from openlm_pipeline.runs.estimates import (
    DEVICES,
    MOMENTS,
    MemoryEstimate,
    estimate_memory,
    flops_per_token,
    optimizer_flops,
    peak_flops,
)
from openlm_pipeline.runs.layout import Layout, layout
from openlm_pipeline.runs.traffic import BETWEEN, INSIDE, Traffic, estimate_traffic
from openlm_pipeline.shards.opening import open_dataset
from openlm_pipeline.storage.home import Home
from openlm_pipeline.units import format_bytes, format_seconds, format_tokens


@dataclass(frozen=True)
class DataNeed:
    """One source of the mixture."""

    name: str
    samples_needed: int
    """Expected number drawn from it up to the last milestone."""
    samples_there: int | None
    """None where its shards are not made yet, or damaged."""

    def line(self, seq_len: int) -> str:
        needed = f"{self.samples_needed:,} samples, {format_tokens(self.samples_needed * seq_len, 3)} tokens, needed"
        if self.samples_there is None:
            return f"{self.name}: {needed}; no whole shards there (`openlm tokenize` makes them)"
        epochs = self.samples_needed / self.samples_there
        return f"{self.name}: {needed}; {self.samples_there:,} there, so {epochs:.3g} epochs"


@dataclass(frozen=True)
class TrainingCost:
    """What a recipe asks for; bytes, seconds and operations are estimates, the rest is exact."""

    name: str
    model: ModelConfig
    seq_len: int
    parameters: int
    flops_per_token: int
    processes: int
    layout: Layout
    steps: int
    tokens: int
    """Up to the last milestone, whole steps; of a fork, those after its parent's."""
    samples: int
    data: tuple[DataNeed, ...]
    memory: MemoryEstimate
    """What one process needs."""
    checkpoint_bytes: int
    checkpoints: int
    """Milestones, and rotating ones where the recipe has them; so many are kept at once, at the end of the run."""
    device_name: str | None
    mfu: float
    seconds: float | None
    """Training time at `mfu` on GPUs called `device_name`; None where no device is named."""
    traffic: Traffic
    optimizer_flops: int = 0
    """Operations of the optimizer per step, over all processes, where they are more than a few per parameter."""
    unread: tuple[str, ...] = ()
    """What the recipe sets without effect, one sentence each."""

    def lines(self) -> Iterator[str]:
        """The plan for people, one fact a line."""
        memory = self.memory
        yield f"{self.name}: {size_line(self.model, self.seq_len)}"
        yield (
            f"{format_tokens(self.tokens, 4)} tokens: {self.steps:,} steps of {self.layout.sequences:,} sequences of "
            f"{self.seq_len:,} tokens, {self.samples:,} samples"
        )
        yield (
            f"{self.processes} process{'es' if self.processes > 1 else ''}, {self.layout.micro_batch} sequences at a "
            f"time in each, {self.layout.micro_batches} micro-batches per step"
        )
        yield (
            f"memory per GPU: {format_bytes(memory.total)} at the peak, {MOMENTS[memory.moment]} (weights "
            f"{format_bytes(memory.weights)}, gradients {format_bytes(memory.gradients)}, optimizer "
            f"{format_bytes(memory.optimizer)}, averages {format_bytes(memory.averages)}, gathered weights "
            f"{format_bytes(memory.gathered)}, activations {format_bytes(memory.activations)}, working memory "
            f"{format_bytes(memory.working)}), without what the allocator and CUDA add; compiled blocks take less"
        )
        if self.processes > 1:
            yield self.traffic_line()
        for source in self.data:
            yield source.line(self.seq_len)
        for sentence in self.unread:
            yield f"note: {sentence}"
        yield (
            f"{self.checkpoints} checkpoints of {format_bytes(self.checkpoint_bytes)}: "
            f"{format_bytes(self.checkpoints * self.checkpoint_bytes)} on disk at the end"
        )
        total_flops = f"{self.tokens * self.flops_per_token:.3g} floating-point operations"
        if self.optimizer_flops:
            total_flops += f" and {self.steps * self.optimizer_flops:.3g} of the optimizer"
        if self.seconds is None:
            yield f"{total_flops}; name a device for the time they take"
        else:
            gpu_hours = self.seconds * self.processes / 3600
            yield (
                f"{total_flops}: {format_seconds(self.seconds)} at {self.mfu:.0%} MFU on {self.processes} x "
                f"{self.device_name}, {gpu_hours:,.4g} GPU-hours, "
                f"{self.tokens / self.seconds / self.processes:,.0f} tokens/s per GPU"
            )

    def traffic_line(self) -> str:
        """What each GPU sends and waits for."""
        traffic = self.traffic
        parts = [f"weights {format_bytes(traffic.gathered)}", f"gradients {format_bytes(traffic.reduced)}"]
        if traffic.by_optimizer:
            parts.append(f"optimizer {format_bytes(traffic.by_optimizer)}")
        line = (
            f"communication per GPU and step: {', '.join(parts)}; {1000 * traffic.seconds:,.1f} ms at "
            f"{INSIDE / 1e9:g} GB/s inside a machine and {traffic.between / 1e9:g} between"
        )
        if self.seconds is None:
            return f"{line}; name a device for the share of a step"
        step = self.seconds / self.steps
        return (
            f"{line}: {traffic.seconds / step:.1%} of a step, hidden behind computing but for "
            f"{traffic.exposed_seconds / step:.1%}"
        )


def size_line(config: ModelConfig, seq_len: int) -> str:
    """Size of a model in one line: what a trainer says at its start, too."""
    parameters = count_parameters(config)
    embedding = 0 if config.weight_tying else config.vocab_size * config.hidden_dim
    return (
        f"{parameters:,} parameters ({parameters - embedding:,} without the input embedding), "
        f"{format_bytes(4 * parameters)} in fp32, {flops_per_token(config, seq_len) / 1e9:,.3g} GFLOP per token"
    )


def describe(
    experiment: Experiment,
    processes: int,
    device_name: str | None = None,
    mfu: float = 0.4,
    home: Home | None = None,
    per_node: int | None = None,
    bandwidth: float = BETWEEN,
) -> TrainingCost:
    """What training up to the last milestone takes.

    Args:
        device_name: a GPU as torch or a person calls it (`H100`); only the time depends on it.
        mfu: share of the device's peak that is reached, 0 to 1.
        home: where shards are looked for; by default `OPENLM_HOME`.
        per_node: processes on a machine; by default as many as the recipe's launcher puts there.
        bandwidth: bytes per second that a GPU sends to other machines.

    Raises:
        ConfigError: the device is not known, or the batch does not divide over the processes.
    """
    if not 0 < mfu <= 1:
        raise ConfigError(f"MFU is a share of a device's peak, above 0 and up to 1, not {mfu}")
    config, training, execution = experiment.model_config_resolved(), experiment.training, experiment.execution
    per_node = per_node or min(processes, experiment.launcher.processes)
    laid = layout(experiment, processes, per_node)
    peak = None
    if device_name is not None:
        peak = peak_flops(device_name, training.precision)
        if peak is None:
            known = ", ".join(d.name for d in DEVICES if getattr(d, training.precision))
            raise ConfigError(
                f"no peak in {training.precision} is known for the device {device_name!r}; known: {known}"
            )
    steps = experiment.steps(experiment.milestones[-1]) - experiment.steps(experiment.start_tokens())
    tokens = steps * training.global_batch
    parameters, flops = count_parameters(config), flops_per_token(config, experiment.seq_len)
    memory, in_optimizer = estimate_memory(experiment, processes, per_node), optimizer_flops(experiment)
    shards = processes // laid.replicas
    rotating = execution.keep_checkpoints if execution.checkpoint_every else 0
    datasets = experiment.training_datasets()
    weight_sum = sum(d.source.weight for d in datasets)
    seconds = (tokens * flops + steps * in_optimizer) / (processes * peak * mfu) if peak else None
    step_seconds = seconds / steps if seconds and steps else None
    return TrainingCost(
        name=experiment.name,
        model=config,
        seq_len=experiment.seq_len,
        parameters=parameters,
        flops_per_token=flops,
        processes=processes,
        layout=laid,
        steps=steps,
        tokens=tokens,
        samples=steps * laid.sequences,
        data=tuple(
            DataNeed(d.name, round(steps * laid.sequences * d.source.weight / weight_sum), samples_there(d, home))
            for d in datasets
        ),
        memory=memory,
        checkpoint_bytes=shards * (memory.weights + memory.optimizer + memory.averages),
        checkpoints=len(experiment.milestones) + rotating,
        device_name=device_name,
        mfu=mfu,
        seconds=seconds,
        traffic=estimate_traffic(experiment, processes, per_node, step_seconds, bandwidth),
        optimizer_flops=in_optimizer,
        unread=tuple(unread_settings(training)),
    )


def samples_there(dataset: Dataset, home: Home | None = None) -> int | None:
    """Samples in the finished shards of a dataset, None where there are none that can be read.

    Raises:
        ConfigError: the shards there have another sequence length.
    """
    try:
        return len(open_dataset(dataset, home or Home.from_env()))
    except (MissingInputError, DataError):  # whoever needs them says what is wrong
        return None
