"""A digest of weights alone: equal for equal weights, whatever world size, mesh or files they were saved with.

It is the fingerprint of [name, dtype, shape, digest] of each parameter, by name. A tensor's digest is the sha256 of its
rows' sha256, a row being what stands at one index of the first dimension; a tensor of fewer than two dimensions is one
row. Bytes are those of the saved type, contiguous, little-endian. Tied weights count once, under the first name that
`named_parameters` gives; buffers, which follow from the model's config, do not count.

So a process of a sharded run hashes the rows it has, and 32 bytes per row are all that is sent: 47 MB for a 7B model.
"""

import hashlib
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from openlm_pipeline.checkpoints.folders import MODEL_CONFIG, Checkpoint, verify
from openlm_pipeline.checkpoints.reading import SafePlanner, SafeReader
from openlm_pipeline.errors import DataError
from openlm_pipeline.fingerprint import fingerprint
from openlm_pipeline.models.config import ModelConfig
from openlm_pipeline.models.transformer import Transformer
from openlm_pipeline.storage.files import read_json


@dataclass(frozen=True)
class Part:
    """What one process knows of a parameter."""

    dtype: str
    shape: tuple[int, ...]
    rows: dict[int, bytes] = field(default_factory=dict)
    """First row -> the sha256 of each row from there on, one after the other."""
    pieces: dict[tuple[int, ...], Tensor] = field(default_factory=dict)
    """Offsets -> values, where a process has no whole rows."""


def local_part(tensor: Tensor) -> Part:
    """This process's part of a parameter, which may be sharded; replicas of a shard are the first process's to give."""
    shape = tuple(tensor.shape)
    part = Part(str(tensor.dtype).removeprefix("torch."), shape)
    offsets: tuple[int, ...] = (0,) * len(shape)
    local = tensor
    if isinstance(tensor, DTensor):
        mesh, placements, local = tensor.device_mesh, tensor.placements, tensor.to_local()
        if any(p.is_replicate() and index for p, index in zip(placements, mesh.get_coordinate())):
            return part
        _, offsets = compute_local_shape_and_global_offset(shape, mesh, placements)
    local = local.detach().cpu().contiguous()
    if not local.numel() and shape:
        return part
    if len(shape) >= 2 and local.shape[1:] == shape[1:]:
        part.rows[offsets[0]] = _row_digests(local)
    else:
        part.pieces[tuple(offsets)] = local
    return part


def _row_digests(tensor: Tensor) -> bytes:
    """The sha256 of each row of a contiguous tensor on the CPU, one after the other."""
    num_rows = tensor.shape[0] if tensor.ndim >= 2 else 1
    data = memoryview(tensor.reshape(-1).view(torch.uint8).numpy())
    size = len(data) // num_rows
    return b"".join(hashlib.sha256(data[i * size : (i + 1) * size]).digest() for i in range(num_rows))


def digest_of_parts(parts: Iterable[Mapping[str, Part]]) -> str:
    """The digest, from the parts of all processes by parameter.

    Raises:
        DataError: together they are not the whole of a parameter.
    """
    found: dict[str, list[Part]] = {}
    for mapping in parts:
        for name, part in mapping.items():
            found.setdefault(name, []).append(part)
    return fingerprint({"weights": [_described(name, found[name]) for name in sorted(found)]})


def _described(name: str, parts: list[Part]) -> list[object]:
    first = parts[0]
    rows = {start: digests for part in parts for start, digests in part.rows.items()}
    pieces = {offsets: values for part in parts for offsets, values in part.pieces.items()}
    if pieces:
        whole = torch.empty(first.shape, dtype=getattr(torch, first.dtype))
        for offsets, values in pieces.items():
            whole[tuple(slice(o, o + n) for o, n in zip(offsets, values.shape))] = values
        missing = whole.numel() - sum(values.numel() for values in pieces.values())
        digests = _row_digests(whole)
    else:
        digests = b"".join(rows[start] for start in sorted(rows))
        missing = first.shape[0] - len(digests) // 32
    if missing or (rows and pieces):
        raise DataError(f"the parts of {name} that the processes have are not the whole of it")
    return [name, first.dtype, list(first.shape), hashlib.sha256(digests).hexdigest()]


def weights_digest(checkpoint: Checkpoint) -> str:
    """The digest of a checkpoint's weights: as recorded, or of one that an earlier release wrote, from its files.

    Reads one parameter at a time.

    Raises:
        DataError: a file is damaged, or is not what a checkpoint of its model holds.
    """
    if checkpoint.weights_digest is not None:
        return checkpoint.weights_digest
    verify(checkpoint)
    described = SafeReader(checkpoint.path).read_metadata().state_dict_metadata
    with torch.device("meta"):
        model = Transformer(ModelConfig(**read_json(checkpoint.path / MODEL_CONFIG)))
    parts = {}
    for name, _ in model.named_parameters():
        saved = described.get(f"model.{name}")
        if not isinstance(saved, TensorStorageMetadata):
            raise DataError(f"{checkpoint.path} has no tensor {name}")
        state = {f"model.{name}": torch.empty(saved.size, dtype=saved.properties.dtype)}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # one process is the intent
            dcp.load(state, storage_reader=SafeReader(checkpoint.path), planner=SafePlanner(), no_dist=True)
        parts[name] = local_part(state[f"model.{name}"])
    return digest_of_parts([parts])
