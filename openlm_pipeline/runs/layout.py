"""How a recipe's batch and weights lie on the processes at hand: the same recipe runs on 1 or 256 of them."""

from dataclasses import dataclass

from openlm_pipeline.errors import ConfigError
from openlm_pipeline.experiments import Experiment
from openlm_pipeline.models import count_parameters

STATE_BYTES = 16 * 10**9
"""Most of a GPU's memory for its share of weights and optimizer where each machine holds them whole."""
_PER_PARAMETER = 12
"""Bytes: a weight in fp32, and AdamW's two moments."""


@dataclass(frozen=True)
class Layout:
    """What each process does in a step."""

    processes: int
    sequences: int
    """In the global batch."""
    local_sequences: int
    """Of them in each process."""
    micro_batch: int
    """Sequences that a process handles at once."""
    replicas: int
    """Groups of processes that each hold all weights."""
    notes: tuple[str, ...]
    """What is otherwise than the recipe says, as sentences."""

    @property
    def micro_batches(self) -> int:
        """Per step."""
        return self.local_sequences // self.micro_batch


def layout(experiment: Experiment, processes: int, per_node: int | None = None) -> Layout:
    """The layout on so many processes: the recipe's `micro_batch` and `replicas`, or the largest divisors below.

    Where the recipe says nothing of `replicas`, each machine holds all weights, so that they are gathered inside it; or
    all machines together, where a process's share would be over `STATE_BYTES`.

    Args:
        per_node: processes on a machine; by default all are on one.

    Raises:
        ConfigError: the global batch does not divide over the processes; names the nearest numbers that it does.
    """
    sequences = experiment.training.global_batch // experiment.seq_len
    if sequences % processes:
        below = largest_divisor(sequences, processes)
        above = (
            next(n for n in range(processes, sequences + 1) if sequences % n == 0) if processes < sequences else None
        )
        near = f"{below} or {above}" if above else str(below)
        raise ConfigError(
            f"a global batch of {sequences} sequences does not divide over {processes} processes; take {near}"
        )
    local, execution = sequences // processes, experiment.execution
    wanted = execution.micro_batch or local
    micro_batch = largest_divisor(local, wanted)
    notes = []
    if execution.micro_batch and micro_batch != execution.micro_batch:
        notes.append(
            f"micro-batches of {micro_batch} sequences, not {wanted}: each of {processes} processes has {local} a step"
        )
    per_node, parameters = per_node or processes, count_parameters(experiment.model_config_resolved())
    if execution.replicas is not None:
        replicas = largest_divisor(processes, execution.replicas)
        if replicas != execution.replicas:
            notes.append(
                f"{replicas} groups with all weights, not {execution.replicas}: there are {processes} processes"
            )
    elif processes % per_node == 0 and parameters * _PER_PARAMETER <= STATE_BYTES * per_node:
        replicas = processes // per_node
        if replicas > 1:
            notes.append(f"the {per_node} processes of each machine hold all weights, and gather them inside it")
    else:
        replicas = 1
    return Layout(processes, sequences, local, micro_batch, replicas, tuple(notes))


def largest_divisor(number: int, at_most: int) -> int:
    """The largest divisor of `number` that is not above `at_most`, which is at least 1."""
    return next(n for n in range(min(number, at_most), 0, -1) if number % n == 0)
