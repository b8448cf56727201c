"""AdamW's state of a checkpoint in one process, whatever number of processes saved it."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from openlm_pipeline.errors import DataError
from openlm_pipeline.runs.checkpoints import Checkpoint, verify
from openlm_pipeline.runs.weights import SafePlanner, SafeReader

_STATE = "optimizer.state."
_GROUPS = "optimizer.param_groups."
_MOMENTS = ("step", "exp_avg", "exp_avg_sq")
_SETTINGS = ("lr", "betas", "eps", "weight_decay")


@dataclass(frozen=True)
class AdamState:
    """What AdamW keeps."""

    moments: dict[str, dict[str, Tensor]]
    """By parameter: `step` (0-d fp32), and `exp_avg` and `exp_avg_sq` in fp32 and the parameter's shape."""
    settings: dict[str, Any]
    """lr, betas, eps and weight_decay; of several groups those of the first, with the largest weight decay."""


def load_adam_state(checkpoint: Checkpoint, parameters: Sequence[str]) -> AdamState | None:
    """The optimizer state of the named parameters; None where a parameter has none of AdamW's.

    Raises:
        DataError: a file is damaged.
    """
    verify(checkpoint)
    reader = SafeReader(checkpoint.path)
    described = reader.read_metadata().state_dict_metadata
    wanted: dict[str, Any] = {}
    for name in parameters:
        for moment in _MOMENTS:
            key = f"{_STATE}{name}.{moment}"
            found = described.get(key)
            if not isinstance(found, TensorStorageMetadata):
                return None
            wanted[key] = torch.empty(found.size, dtype=found.properties.dtype)
    settings = [k for k in described if k.startswith(_GROUPS) and k.rpartition(".")[2] in _SETTINGS]
    wanted |= dict.fromkeys(settings)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # one process is the intent
        dcp.load(wanted, storage_reader=reader, planner=SafePlanner(), no_dist=True)
    groups = {name: [wanted[k] for k in settings if k.endswith(f".{name}")] for name in _SETTINGS}
    if missing := [name for name, values in groups.items() if not values]:
        raise DataError(f"{checkpoint.path} has no {', '.join(missing)} among its optimizer's settings")
    return AdamState(
        {name: {m: wanted[f"{_STATE}{name}.{m}"].float() for m in _MOMENTS} for name in parameters},
        {name: max(values) if name == "weight_decay" else values[0] for name, values in groups.items()},
    )
