"""How much memory a GPU needs for a recipe, as arithmetic on its settings. Needs no torch and no data.

The parts are what FSDP2 and autograd keep alive: each is an upper bound of its own, and they are added up although not
all of them peak at one time. What the allocator wastes and the CUDA context (about 1 GB) come on top. Compiled blocks
keep less. Against measured peaks of one process the total is right within the factor `TOLERANCE`.
"""

from dataclasses import asdict, dataclass

from openlm_pipeline.experiments import Experiment
from openlm_pipeline.models import count_parameters
from openlm_pipeline.models.config import ModelConfig

TOLERANCE = 1.35

_BYTES = {"fp32": 4, "bf16": 2}
_LOGIT_COPIES = 3
"""fp32 arrays as large as the logits in the backward pass of the loss: log-probabilities, and two gradients."""


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of one process."""

    weights: int
    """This rank's share of the weights."""
    gradients: int
    """The share of the gradients, or all of them where micro-batches are added up before they are reduced."""
    optimizer: int
    averages: int
    gathered: int
    """Whole weights of the blocks under way and of the embeddings, and the latter's gradients."""
    activations: int
    logits: int

    @property
    def total(self) -> int:
        return sum(asdict(self).values())


def block_activations(config: ModelConfig, element_bytes: int, keep: str) -> int:
    """Bytes a token that one block keeps for its backward pass, or works with while it is made again.

    Args:
        keep: `none`, `selective` or `full` activation checkpointing.
    """
    width, inner, hidden = config.hidden_dim, config.n_heads * config.head_dim, config.ffn_dim
    if keep == "full":
        return width * element_bytes  # the block's input
    projected = 2 * hidden if config.ffn != "gelu" else hidden
    # Input, q, k and v, what attention gives, what its projection gives, the first and the last product of the FFN.
    kept = 3 * width + 4 * inner + projected
    if keep == "none":
        kept += width + 2 * inner + 2 * hidden  # also a second norm, turned q and k, silu(gate) and its product
    return kept * element_bytes


def estimate_memory(experiment: Experiment, processes: int) -> MemoryEstimate:
    """What each of `processes` needs."""
    config, training, execution = experiment.model_config_resolved(), experiment.training, experiment.execution
    num_parameters, compute_bytes = count_parameters(config), _BYTES[training.precision]
    state_bytes = _BYTES[training.state_precision]
    shards = max(1, processes // execution.replicas)
    embeddings = (1 if config.weight_tying else 2) * config.vocab_size * config.hidden_dim
    blocks = num_parameters - embeddings
    local_sequences = training.global_batch // experiment.seq_len // processes
    micro_batch = execution.micro_batch or local_sequences
    tokens = micro_batch * experiment.seq_len
    # FSDP adds up micro-batches' gradients whole, in the type it will reduce them in.
    gradients = num_parameters * (4 if micro_batch < local_sequences else state_bytes / shards)
    muon_blocks = blocks if training.optimizer == "muon" else 0
    alive = embeddings + (2 * blocks // config.n_layers if execution.reshard_after_forward else blocks)
    per_token = config.n_layers * block_activations(config, compute_bytes, execution.activation_checkpointing)
    working = block_activations(config, compute_bytes, "none")
    return MemoryEstimate(
        weights=num_parameters * state_bytes // shards,
        gradients=int(gradients),
        optimizer=(2 * num_parameters - muon_blocks) * state_bytes // shards,
        averages=len(training.averages) * num_parameters * 4 // shards,
        gathered=alive * compute_bytes + embeddings * compute_bytes,
        activations=tokens * (per_token + working + 2 * config.hidden_dim * compute_bytes),
        logits=min(execution.loss_chunk, tokens) * config.vocab_size * 4 * _LOGIT_COPIES,
    )
