"""A dataset of a few short files with a tokenizer of its own: what the tests of the data engine share."""

import json
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from openlm_pipeline.errors import OpenLMError
from openlm_pipeline.experiments import Dataset, Experiment
from openlm_pipeline.pipeline import data as data_stages
from openlm_pipeline.pools import PoolFactory
from openlm_pipeline.result import StageResult
from openlm_pipeline.shards.dataset import ShardedDataset
from openlm_pipeline.shards.manifest import write_manifest
from openlm_pipeline.storage.files import sha256_file, write_json
from openlm_pipeline.storage.home import Home
from openlm_pipeline.tokenization.documents import FileTokens

EOT = "<|endoftext|>"
SEQ_LEN = 16
SENTENCES = (
    "The quick brown fox jumps over the lazy dog, and nobody knows why.\n",
    "Größe, façade, naïve: letters beyond ASCII are letters too. ",
    "e\u0301 is one letter in two code points; \u1112\u1161\u11ab is a syllable in three. ",
    "\r\n\ttabs\u00a0and\u2028separators\x00stay as they are 🦊👩‍👩‍👧 ",
    "数据从原始文本到分数。",
    "def f(x):\n    return x ** 2  # code\n",
)


def documents(count: int, first: int = 0) -> list[str]:
    """Distinct short documents; an empty one, one of a blank line and one that names the end-of-text token are in."""
    made = [
        f"{n}: " + "".join(SENTENCES[(n * 7 + k * (n % 3 + 1)) % len(SENTENCES)] for k in range(n % 5 + 1))
        for n in range(first, first + count)
    ]
    made[1:4] = ["", "\n", f"before {EOT} after"]
    return made


def write_lines(path: Path, lines: Iterable[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"".join(line.encode() + b"\n" for line in lines))


def as_line(number: int, text: str) -> str:
    """A JSON line; every other one escapes what is not ASCII."""
    return json.dumps({"text": text, "meta": {"pile_set_name": "small"}}, ensure_ascii=number % 2 == 0)


@dataclass(frozen=True)
class SmallDataset:
    """One dataset below a home of its own."""

    root: Path
    settings: dict[str, Any] = field(default_factory=dict)
    """Fields of the experiment that differ from the usual."""
    source: dict[str, Any] = field(default_factory=dict)
    """Fields of the source that differ from the usual."""

    @property
    def home(self) -> Home:
        return Home(self.root)

    @property
    def experiment(self) -> Experiment:
        usual = {
            "name": "small",
            "tokenizer": {"name": "small_bpe", "source": str(self.root / "small_bpe.json")},
            "seq_len": SEQ_LEN,
            "samples_per_shard": 32,
            "sources": [{"name": "text", "files": ["raw/*.jsonl"], **self.source}],
            "model": {"hidden_dim": 8, "n_layers": 1, "n_heads": 1, "vocab_size": 512},
            "training": {"global_batch": SEQ_LEN, "lr": 1e-3},
            "milestones": [SEQ_LEN],
        }
        return Experiment(**{**usual, **self.settings})

    @property
    def dataset(self) -> Dataset:
        return self.experiment.datasets()[0]

    @property
    def tokenized(self) -> Path:
        return self.home.tokenized("text", "v1")

    @property
    def shards(self) -> Path:
        return self.home.shards("text", "v1")

    def raw(self, name: str) -> Path:
        return self.root / "raw" / name

    def write(self, texts: dict[str, list[str]]) -> None:
        """Raw files by name, a blank line after each third record."""
        for name, file_texts in texts.items():
            lines: list[str] = []
            for number, text in enumerate(file_texts):
                lines += [as_line(number, text), *([""] if number % 3 == 2 else [])]
            write_lines(self.raw(name), lines)

    def tokenizer(self) -> StageResult:
        return data_stages.ensure_tokenizer(self.experiment, self.home, lambda line: None, {"supersede"})

    def tokenize(self, clients: PoolFactory, only: set[str] | None = None) -> tuple[list[FileTokens], list[str]]:
        return data_stages.tokenize(self.dataset, self.home, clients, lambda line: None, only)

    def make_shards(self, files: list[FileTokens], clients: PoolFactory) -> StageResult:
        return data_stages.make_shards(self.dataset, files, self.home, clients, lambda line: None, {"supersede"})

    def run(self, clients: PoolFactory) -> StageResult:
        """All stages from raw files to shards."""
        self.tokenizer()
        files, _ = self.tokenize(clients)
        return self.make_shards(files, clients)

    def manifest(self) -> str:
        """The manifest's text, after reading every shard and finding it as recorded."""
        ShardedDataset(self.shards).verify()
        return (self.shards / "manifest.jsonl").read_text()

    def reseal(self) -> None:
        """Make the manifest vouch for what is in the folder now, as if the shards had been made so."""
        from resealed import reseal  # programs that use this module have no path to it

        reseal(self.shards)

    def make_first_release(self) -> None:
        """Take away what the first release did not write, and from the manifest what it did not say."""
        made = ShardedDataset(self.shards)
        info = {name: value for name, value in made.info.items() if name != "version_sha256"}
        write_json(self.shards / "dataset.json", info)
        entries = [replace(e, sums_sha256=None, provenance_sha256=None, beside=None) for e in made.entries]
        write_manifest(self.shards, entries)
        for path in [self.shards / "documents.parquet", *(self.shards / e.sums for e in entries)]:
            path.unlink()

    def all_hashes(self) -> dict[str, str]:
        """sha256 of every file of the finished dataset, but the lock's."""
        return {str(p.relative_to(self.shards)): sha256_file(p) for p in self.shards.rglob("*") if p.is_file()}

    def recovered(self) -> dict[tuple[str, int], list[int]]:
        """Token ids of each (file, record), put together from shards by their provenance alone."""
        made = ShardedDataset(self.shards)
        spans = [
            row
            for entry in made.entries
            for row in pq.read_table(self.shards / f"{entry.shard}.provenance.parquet").to_pylist()
        ]
        found: dict[tuple[str, int], list[int]] = {}
        for row in sorted(spans, key=lambda r: (r["file"], r["record"], r["document_start"])):
            ids = found.setdefault((row["file"], row["record"]), [])
            assert row["document_start"] == len(ids), f"a gap or an overlap before {row}"
            ids += made[row["sample"]][row["start"] : row["start"] + row["length"]].tolist()
        return found


def message_of(error: OpenLMError, *parts: str) -> str:
    """The text of an error, which must hold all `parts`."""
    text = str(error)
    assert [part for part in parts if part not in text] == [], text
    return text
