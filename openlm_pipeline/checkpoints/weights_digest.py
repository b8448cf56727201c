"""A digest of weights alone: equal for equal weights, whatever world size, mesh or files they were saved with.

It is the fingerprint of [name, dtype, shape, digest] of each parameter, by name. A tensor's digest is the sha256 of its
rows' sha256, a row being what stands at one index of the first dimension; a tensor of fewer than two dimensions is one
row. Bytes are those of the saved type, contiguous, little-endian. A tied weight counts once, under the first name that
`named_parameters` gives; buffers, which follow from the model's config, do not count.

So a process of a sharded run hashes the rows it has and sends 32 bytes for each, in all 47 MB for a 7B model. What is
sent as it is are tensors whose rows are split over processes: with FSDP those of one dimension, 1 MB for a 7B model.
"""

import hashlib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.tensor import DTensor

from openlm_pipeline.checkpoints.folders import Checkpoint, verify
from openlm_pipeline.checkpoints.reading import SafeReader, load_alone, model_without_weights
from openlm_pipeline.errors import DataError
from openlm_pipeline.fingerprint import fingerprint


@dataclass(frozen=True)
class Part:
    """What one process tells of a parameter: a block of it."""

    dtype: str
    shape: tuple[int, ...]
    """The whole parameter's."""
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    data: bytes
    """The sha256 of each row, one after the other, where the block has `whole_rows`; otherwise its elements. Empty
    where the block is, or where another process has the same one and gives it."""

    @property
    def whole_rows(self) -> bool:
        return len(self.shape) >= 2 and self.sizes[1:] == self.shape[1:]


def local_part(tensor: Tensor) -> Part:
    """This process's part of a parameter, which may be sharded.

    The processes that have replicas of the same rows share them out; of other blocks the first one gives all.
    """
    local, shape = tensor, tuple(tensor.shape)
    offsets, replica, replicas = [0] * len(shape), 0, 1
    if isinstance(tensor, DTensor):
        mesh = tensor.device_mesh
        for placement, size, index in zip(tensor.placements, mesh.shape, mesh.get_coordinate()):
            if placement.is_replicate():
                replica, replicas = replica * size + index, replicas * size
        (chunk,) = tensor.__create_chunk_list__()
        local, offsets = tensor.to_local(), list(chunk.offsets)
    if len(shape) >= 2 and local.shape[1:] == shape[1:]:
        first, end = (len(local) * n // replicas for n in (replica, replica + 1))
        local, offsets[0] = local[first:end], offsets[0] + first
        data = _row_digests(_elements(local), len(local))
    else:
        data = b"" if replica else _elements(local).tobytes()
    return Part(str(tensor.dtype).removeprefix("torch."), shape, tuple(offsets), tuple(local.shape), data)


def _elements(tensor: Tensor) -> np.ndarray:
    """The bytes of a tensor's elements in their order, uint8 [n]."""
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()


def _row_digests(elements: np.ndarray, num_rows: int) -> bytes:
    data = memoryview(elements)
    size = len(data) // max(num_rows, 1)
    return b"".join(hashlib.sha256(data[n * size : (n + 1) * size]).digest() for n in range(num_rows))


def digest_of_parts(processes: Iterable[Mapping[str, Part]]) -> str:
    """The digest, from the parts of all processes by parameter.

    Raises:
        DataError: together they are not the whole of a parameter.
    """
    parts: dict[str, list[Part]] = {}
    for mapping in processes:
        for name, part in mapping.items():
            parts.setdefault(name, []).append(part)
    return fingerprint({"weights": [_described(name, parts[name]) for name in sorted(parts)]})


def _described(name: str, parts: list[Part]) -> list[object]:
    dtype, shape = parts[0].dtype, parts[0].shape
    given = sorted((part for part in parts if part.data), key=lambda part: part.offsets)
    if sum(math.prod(part.sizes) for part in given) != math.prod(shape) or len({p.whole_rows for p in given}) != 1:
        raise DataError(f"the parts of {name} that the processes have are not the whole of it")
    digests = b"".join(part.data for part in given) if given[0].whole_rows else _digests_of_blocks(shape, given)
    return [name, dtype, list(shape), hashlib.sha256(digests).hexdigest()]


def _digests_of_blocks(shape: tuple[int, ...], parts: list[Part]) -> bytes:
    """The sha256 of each row of a tensor whose rows are split over processes."""
    width = sum(len(part.data) for part in parts) // math.prod(shape)
    whole = np.empty((*shape, width), np.uint8)
    for part in parts:
        block = tuple(slice(offset, offset + size) for offset, size in zip(part.offsets, part.sizes))
        whole[block] = np.frombuffer(part.data, np.uint8).reshape(*part.sizes, width)
    return _row_digests(whole.reshape(-1), shape[0] if len(shape) >= 2 else 1)


def weights_digest(checkpoint: Checkpoint) -> str:
    """The digest of a checkpoint's weights: as recorded or, where an earlier release wrote it, from its files.

    In the latter case all its files are read, and the weights again, one parameter at a time in memory.

    Raises:
        DataError: a file is damaged, or is not what a checkpoint of its model holds.
    """
    if checkpoint.weights_digest is not None:
        return checkpoint.weights_digest
    verify(checkpoint)
    reader = SafeReader(checkpoint.path)
    described = reader.read_metadata().state_dict_metadata
    model = model_without_weights(checkpoint, described)
    parts = {}
    for name, parameter in model.named_parameters():
        key = f"model.{name}"
        saved = described.get(key)
        if not isinstance(saved, TensorStorageMetadata) or saved.size != parameter.shape:
            raise DataError(f"{checkpoint.path} has no tensor {name} of shape {list(parameter.shape)}")
        state = {key: torch.empty(saved.size, dtype=saved.properties.dtype)}
        load_alone(state, reader)
        parts[name] = local_part(state[key])
    return digest_of_parts([parts])
