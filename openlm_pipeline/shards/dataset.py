"""A finished dataset of shards: `manifest.jsonl`, `dataset.json`, and samples by number.

The manifest is written last, so a folder without one is unfinished and nobody reads it.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from openlm_pipeline.errors import DataError, MissingInputError
from openlm_pipeline.files import read_json, sha256_file, write_text
from openlm_pipeline.shards.format import SampleFormat, open_shard

MANIFEST = "manifest.jsonl"
DATASET = "dataset.json"


@dataclass(frozen=True)
class ShardEntry:
    """A line of the manifest. `shard` and `num_sequences` are OpenLM's keys."""

    shard: str
    num_sequences: int
    bytes: int
    sha256: str
    tokens: int
    source: str


def write_manifest(folder: Path, entries: list[ShardEntry]) -> None:
    """Write the manifest: the mark that the dataset is whole."""
    write_text(folder / MANIFEST, "".join(json.dumps(vars(e)) + "\n" for e in entries))


def read_manifest(folder: Path) -> list[ShardEntry]:
    """The manifest's lines in order.

    Raises:
        MissingInputError: there is no manifest: the dataset was never made, or not finished.
        DataError: a line is not a manifest entry.
    """
    path = folder / MANIFEST
    try:
        lines = path.read_text().splitlines()
    except FileNotFoundError:
        raise MissingInputError(
            f"there are no finished shards in {folder}; `openlm tokenize RECIPE` makes them"
        ) from None
    entries = []
    for number, line in enumerate(lines, 1):
        try:
            entries.append(ShardEntry(**json.loads(line)))
        except (json.JSONDecodeError, TypeError) as e:
            raise DataError(f"{path}, line {number} is not a manifest entry: {e}") from e
    return entries


class ShardedDataset:
    """Samples of a finished dataset by number, over memory-mapped shards."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.entries = read_manifest(folder)
        self.info: dict[str, Any] = read_json(folder / DATASET)
        self.format = SampleFormat(self.info["seq_len"] + 1, self.info["dtype"])
        self.version = sha256_file(folder / MANIFEST)
        """sha256 of the manifest, which holds the sha256 of every shard."""
        self._first = np.cumsum([0, *(e.num_sequences for e in self.entries)])
        self._open: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        return int(self._first[-1])

    def __getitem__(self, index: int) -> np.ndarray:
        """Sample `index` as token ids [seq_len + 1]."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        k = int(np.searchsorted(self._first, index, side="right")) - 1
        if k not in self._open:
            self._open[k] = open_shard(
                self.folder / f"{self.entries[k].shard}.tar", self.entries[k].num_sequences, self.format
            )
        return self._open[k][index - self._first[k]]

    def verify(self) -> None:
        """Read every shard and compare its sha256 with the manifest's.

        Raises:
            DataError: names the first shard that differs.
        """
        for entry in self.entries:
            path = self.folder / f"{entry.shard}.tar"
            open_shard(path, entry.num_sequences, self.format)
            if (found := sha256_file(path)) != entry.sha256:
                raise DataError(f"shard {path} has sha256 {found}, but the manifest says {entry.sha256}: it is damaged")
