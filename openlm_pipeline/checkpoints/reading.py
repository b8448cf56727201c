"""The tensors of a checkpoint in one process, whatever number of processes saved it: the model, AdamW's state.

DCP's `.metadata` is a pickle; it is read here by an unpickler that knows the classes of that description only, so that
a foreign folder cannot run code.
"""

import enum
import io
import pickle
import warnings
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException, FileSystemReader
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import ReadItem

from openlm_pipeline.checkpoints.folders import Checkpoint, check_layers, recorded_config, verify
from openlm_pipeline.errors import DataError
from openlm_pipeline.models.transformer import Transformer

_ALLOWED: dict[str, set[str]] = {
    "torch": {"Size", "float32", "float64", "bfloat16", "float16", "int64", "int32", "uint8", "bool"},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.metadata": {
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorStorageMetadata",
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "TensorProperties",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "_StoragePrefix", "SerializationFormat"},
    "pathlib": {"PosixPath", "Path"},
    "pathlib._local": {"PosixPath", "Path"},  # their name in Python 3.13
    "collections": {"OrderedDict"},
    "builtins": {"list", "dict", "set", "tuple"},
}


def _foreign(name: str) -> DataError:
    return DataError(f"the checkpoint's .metadata names {name}, which no checkpoint of ours does")


def _member(owner: object, name: str) -> enum.Enum:
    """What `getattr` may stand for in a pickle: Python 3.11.0 to 3.11.3 write a member of an enum as one."""
    if not (isinstance(owner, enum.EnumMeta) and name in owner.__members__):
        raise _foreign(f"{owner}.{name}")
    return owner[name]


class _MetadataUnpickler(pickle._Unpickler):  # the one in C, twice as fast, lets nobody look at BUILD
    dispatch = dict(pickle._Unpickler.dispatch)

    def load_build(self) -> None:
        """Set attributes, of descriptions only: those of a class or an enum's member are everybody's."""
        kind = type(self.stack[-2])
        if not kind.__module__.startswith("torch.distributed.checkpoint.") or issubclass(kind, enum.Enum):
            raise _foreign(f"attributes of {self.stack[-2]!r:.100}")
        super().load_build()

    dispatch[pickle.BUILD[0]] = load_build

    def find_class(self, module: str, name: str) -> object:
        if (module, name) == ("builtins", "getattr"):
            return _member
        if name not in _ALLOWED.get(module, ()):
            raise _foreign(f"{module}.{name}")
        return super().find_class(module, name)


class SafeReader(FileSystemReader):
    """DCP's reader for folders, with the metadata read by an unpickler that runs nothing, and once only."""

    _metadata: Metadata | None = None

    def read_metadata(self, *args: object, **kwargs: object) -> Metadata:
        if self._metadata is None:
            self._metadata = self._read_metadata()
        self._metadata.storage_meta.load_id = self.load_id
        return self._metadata

    def _read_metadata(self) -> Metadata:
        path = Path(self.path) / ".metadata"
        with path.open("rb") as f:
            try:
                metadata = _MetadataUnpickler(f).load()
            except DataError:
                raise
            except Exception as e:  # noqa: BLE001 - the classes of a description raise whatever they like
                raise DataError(f"{path} is not the description of a checkpoint: {e}") from e
        if not isinstance(metadata, Metadata):
            raise DataError(f"{path} is not the description of a checkpoint")
        if getattr(metadata, "storage_meta", None) is None:
            metadata.storage_meta = self.storage_meta()
        return metadata


class SafePlanner(DefaultLoadPlanner):
    """DCP's planner, which would run what a value that is not a tensor says; here it may be plain data only."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        torch.load(value, weights_only=True)  # raises where there is more than plain data
        value.seek(0)
        super().load_bytes(read_item, value)


def load_alone(state: dict[str, Any], reader: SafeReader) -> None:
    """`dcp.load` in this process only.

    Raises:
        DataError: its files do not hold what its description says.
    """
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # one process is the intent
            dcp.load(state, storage_reader=reader, planner=SafePlanner(), no_dist=True)
    except CheckpointException as e:
        cause = next((cause for cause, _ in e.failures.values()), e)
        if not isinstance(cause, Exception):  # Ctrl-C or SIGTERM, which DCP takes for a failure
            raise cause from None
        said = (str(cause).strip() or type(cause).__name__).splitlines()[0]
        raise DataError(f"the checkpoint {reader.path} is damaged, or holds more than tensors: {said}") from e


def model_without_weights(checkpoint: Checkpoint, described: Collection[str]) -> Transformer:
    """The model that a checkpoint says that it holds, on the meta device.

    Args:
        described: names of the tensors that it describes.

    Raises:
        MissingInputError, DataError: it does not say so, or its tensors are too few.
    """
    config = recorded_config(checkpoint.path)
    check_layers(checkpoint.path, config, described)
    with torch.device("meta"):
        return Transformer(config)


def load_model(
    checkpoint: Checkpoint, device: torch.device | str = "cpu", *, average: str | None = None
) -> Transformer:
    """The verified weights of a checkpoint, fp32, in evaluation mode.

    Args:
        average: one of the recipe's `training.averages`, to have it in place of the last weights.

    Raises:
        DataError: a file is damaged, or is not what a checkpoint of this model holds.
    """
    verify(checkpoint)
    reader = SafeReader(checkpoint.path)
    described = reader.read_metadata().state_dict_metadata  # read here, as DCP would wrap its error in another
    model = model_without_weights(checkpoint, described)

    def wanted() -> dict[str, dict[str, Tensor]]:
        if average is None:
            return {"model": model.state_dict()}
        parameters = {name: p.detach() for name, p in model.named_parameters()}
        return {"model": dict(model.named_buffers()), average: parameters}

    for part, tensors in wanted().items():
        for name, value in tensors.items():
            found = described.get(f"{part}.{name}")
            if not isinstance(found, TensorStorageMetadata) or found.size != value.shape:
                kind = "" if part == "model" else f" in the average {part}"
                raise DataError(f"{checkpoint.path} has no tensor {name} of shape {list(value.shape)}{kind}")
    model.to_empty(device=device)
    model.init_buffers()
    load_alone(wanted(), reader)
    return model.eval()


def averages_in(checkpoint: Checkpoint) -> list[str]:
    """Names of the averages of the weights that a checkpoint holds."""
    tensors = SafeReader(checkpoint.path).read_metadata().state_dict_metadata
    parts = {name.partition(".layers.0.")[0] for name in tensors if ".layers.0." in name}
    return sorted(part for part in parts if part.startswith(("ema_", "poly_")))


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
    load_alone(wanted, reader)
    groups = {name: [wanted[k] for k in settings if k.endswith(f".{name}")] for name in _SETTINGS}
    if missing := [name for name, values in groups.items() if not values]:
        raise DataError(f"{checkpoint.path} has no {', '.join(missing)} among its optimizer's settings")
    return AdamState(
        {name: {m: wanted[f"{_STATE}{name}.{m}"].float() for m in _MOMENTS} for name in parameters},
        {name: max(values) if name == "weight_decay" else values[0] for name, values in groups.items()},
    )
