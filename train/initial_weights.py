"""Weights to begin training with: those of a checkpoint, or the weighted sum of several."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

from openlm_pipeline.errors import MissingInputError
from openlm_pipeline.files import sha256_file
from openlm_pipeline.lineage.fingerprint import Tree, fingerprint
from openlm_pipeline.models import ModelConfig, Transformer, load_checkpoint
from train.distributed import World


def weights_identity(weights: Mapping[Path, float]) -> Tree:
    """What a run records of its initial weights: the hash of each checkpoint's content, and its coefficient.

    Raises:
        MissingInputError: a checkpoint is not there.
    """
    return [{"sha256": _digest(path), "coefficient": coefficient} for path, coefficient in weights.items()]


def _digest(path: Path) -> str:
    if not path.exists():
        raise MissingInputError(f"there is no checkpoint {path} to begin with")
    if path.is_file():
        return sha256_file(path)
    return fingerprint({p.name: sha256_file(p) for p in sorted(path.iterdir()) if p.is_file()})


def load_initial_weights(
    model: torch.nn.Module, config: ModelConfig, weights: Mapping[Path, float], world: World
) -> None:
    """Put the sum of coefficient times weights into the sharded `model`; the first process alone reads.

    Raises:
        OpenLMError: a checkpoint can't be read, or is not one of this model; on every process.
    """
    state: dict[str, torch.Tensor] = {}

    def read() -> None:
        with torch.no_grad():
            for path, coefficient in weights.items():
                loaded: Transformer = load_checkpoint(path, config=config, warn=lambda note: print(f"note: {note}"))
                parameters = dict(loaded.named_parameters())
                for name, value in loaded.state_dict().items():
                    if name not in parameters:
                        state[name] = value
                    else:
                        state[name] = value * coefficient + state.get(name, 0)

    world.from_rank0(read)
    # A checkpoint holds no frequencies that the model does not make itself.
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, strict=False)
    set_model_state_dict(model, state, options=options)
