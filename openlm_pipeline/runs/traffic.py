"""What a step sends between GPUs: bytes of its gathers and reduces, and how long they take beside its computing.

FSDP2 gathers the weights of each block for the forward pass and again for the backward pass of every micro-batch, those
outside the blocks once, and reduces all gradients in fp32 in the last micro-batch. Replicas add up their
shards of them. A ring passes (n - 1) / n of the bytes through each of its n GPUs, twice where all get the sum.

Needs neither torch nor data.
"""

from dataclasses import dataclass

from openlm_pipeline.experiments import Experiment
from openlm_pipeline.models import count_parameters
from openlm_pipeline.registry import OPTIMIZERS
from openlm_pipeline.runs.estimates import BYTES, block_matrices
from openlm_pipeline.runs.layout import layout

INSIDE, BETWEEN = 450e9, 50e9
"""Bytes per second that a GPU sends: over NVLink of an H100, and over a network card of 400 Gb/s of its own."""


@dataclass(frozen=True)
class Traffic:
    """Of one process and one step."""

    gathered: int
    """Bytes of whole weights, as often as they are gathered."""
    reduced: int
    """Bytes of gradients that go into reduce-scatters and all-reduces."""
    by_optimizer: int
    """Bytes that the optimizer sends."""
    seconds: float
    """On the wire, if nothing else went over it."""
    between: float
    """Bytes per second between machines that this is reckoned with."""
    exposed_seconds: float | None
    """Of those while the GPU has nothing to compute; None where it isn't known how long computing takes."""


def estimate_traffic(
    experiment: Experiment,
    processes: int,
    per_node: int | None = None,
    compute_seconds: float | None = None,
    between: float = BETWEEN,
) -> Traffic:
    """The traffic of each of `processes`, of which `per_node` are on a machine, or all.

    Args:
        compute_seconds: of a step without any communication.
        between: bytes per second that a GPU sends to other machines.
    """
    config, training = experiment.model_config_resolved(), experiment.training
    laid = layout(experiment, processes, per_node)
    per_node = per_node or processes
    shards, micro_batches, blocks = processes // laid.replicas, laid.micro_batches, config.n_layers
    matrix = config.vocab_size * config.hidden_dim
    root = matrix if config.weight_tying else 2 * matrix
    matrices = block_matrices(config)
    block = (count_parameters(config) - root) / blocks
    block += sum(-rows % shards * columns for rows, columns in matrices)  # rows are filled up to a multiple of shards
    sharded, replicated, element = shards > 1, laid.replicas > 1, BYTES[training.precision]
    inside = INSIDE if shards <= per_node else between
    among_replicas = INSIDE if processes <= per_node else between

    def gather(parameters: float) -> float:
        return sharded * element * parameters / inside * (shards - 1) / shards

    def reduce(parameters: float) -> float:
        all_reduce = 2 * 4 * parameters / shards / among_replicas * (laid.replicas - 1) / laid.replicas
        return sharded * 4 * parameters / inside * (shards - 1) / shards + all_reduce

    passes = 2 if experiment.execution.reshard_after_forward else 1
    by_optimizer = OPTIMIZERS[training.optimizer](training).bytes_per_step(blocks * matrices, shards)
    optimizer_seconds = by_optimizer / inside
    exposed = None
    if compute_seconds is not None:
        forward = compute_seconds / micro_batches / blocks / 3  # of one block; the backward pass takes twice that

        def over(sending: float, computing: float) -> float:
            return max(0.0, sending - computing)

        each = (
            gather(matrix) + gather(block) + (blocks - 1) * over(gather(block), forward) + over(gather(matrix), forward)
        )
        again = (passes - 1) * gather(block)
        plain = (blocks - 1) * over(again, 2 * forward)
        last = (blocks - 1) * over(again + reduce(block), 2 * forward) + over(reduce(root - matrix), 2 * forward)
        exposed = micro_batches * each + (micro_batches - 1) * plain + last + reduce(block) + reduce(matrix)
        exposed += optimizer_seconds
    gathers = micro_batches * (gather(root) + passes * blocks * gather(block))
    return Traffic(
        gathered=int(sharded * micro_batches * element * (root + passes * blocks * block)),
        reduced=int(4 * (root + blocks * block) * (sharded + replicated / shards)),
        by_optimizer=by_optimizer,
        seconds=gathers + reduce(root) + blocks * reduce(block) + optimizer_seconds,
        between=between,
        exposed_seconds=exposed,
    )
