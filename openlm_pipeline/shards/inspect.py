"""Looking at a finished dataset: is it whole, what is in it, and which documents is a sample made of."""

import os
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

import numpy as np
import orjson

from openlm_pipeline.errors import ConfigError, DataError, IdentityError, MissingInputError
from openlm_pipeline.shards.dataset import ShardedDataset
from openlm_pipeline.shards.format import open_shard
from openlm_pipeline.shards.manifest import (
    DATASET,
    QUARANTINE,
    QUARANTINE_SUM,
    check_hash,
    read_dataset,
    recorded_beside,
)
from openlm_pipeline.shards.provenance import provenance_path, read_spans, shard_tokens
from openlm_pipeline.storage.files import sha256_file
from openlm_pipeline.storage.home import Home
from openlm_pipeline.units import format_tokens

QUANTILES = (0.0, 0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99, 1.0)
_TOP_REASONS = 3
_THREADS = min(8, os.cpu_count() or 1)


def check_shards(folder: Path, *, quick: bool = False) -> Iterator[tuple[str, str | None]]:
    """Check every shard; yields (its file's name, what is wrong with it or None) in order, then the same of the files
    beside all shards that the manifest lists.

    Args:
        quick: only that each file is there, and that each shard has its size. Else the sha256 of the shard and of what
            is beside it, and that the provenance covers its tokens.

    Raises:
        MissingInputError: there is no finished dataset.
    """
    try:
        dataset = ShardedDataset(folder)
    except DataError as e:
        yield DATASET, str(e)
        return
    beside = recorded_beside(dataset.entries)

    def check(k: int) -> str | None:
        entry = dataset.entries[k]
        try:
            open_shard(folder / entry.tar, entry.num_sequences, dataset.format)
            if quick:
                missing = next((name for name in entry.hashes if not (folder / name).exists()), None)
                return f"{folder / missing} is missing though the manifest lists it" if missing else None
            dataset.check_shard(k)
            if provenance_path(dataset, k).exists():
                read_spans(dataset, k)
        except (DataError, OSError) as e:
            return str(e)
        return None

    def check_beside(name: str) -> str | None:
        try:
            check_hash(folder / name, beside[name])
        except DataError as e:
            return str(e)
        return None

    with ThreadPoolExecutor(_THREADS, thread_name_prefix="verify") as pool:
        for entry, problem in zip(dataset.entries, pool.map(check, range(len(dataset.entries)))):
            yield entry.tar, problem
        yield from zip(beside, pool.map(check_beside, beside))


def quarantine_reasons(path: Path) -> list[tuple[str, int]]:
    """The most frequent reasons in a `quarantine.jsonl`, each with the number of its records."""
    with path.open("rb") as lines:
        reasons = Counter(orjson.loads(x)["reason"].partition(":")[0].partition(" at byte ")[0] for x in lines)
    return reasons.most_common(_TOP_REASONS)


def summary(folder: Path, seconds: float | None = None) -> str:
    """One line on what became of a dataset's raw files.

    Args:
        seconds: that tokenizing and packing took, for the speed.
    """
    _, info, _ = read_dataset(folder)
    if (recorded := folder / QUARANTINE_SUM).exists():
        sha256 = recorded.read_text(errors="replace").partition(" ")[0]
        check_hash(folder / QUARANTINE, sha256, said_by=QUARANTINE_SUM)
    totals, skipped = info["totals"], len(info.get("skipped", {}))
    top = ", ".join(f"{count:,} {reason}" for reason, count in quarantine_reasons(folder / QUARANTINE))
    parts = [
        f"{totals['files']:,} files" + (f" and {skipped:,} left out" if skipped else ""),
        f"{totals['documents']:,} documents",
        *([f"{totals['dropped']:,} dropped"] if "dropped" in totals else []),
        f"{totals['quarantined']:,} quarantined" + (f" ({top})" if top else ""),
        f"{format_tokens(totals['tokens'], 4)} tokens",
    ]
    if seconds:
        parts.append(f"{format_tokens(round(totals['tokens'] / seconds), 3)} tokens/s")
    return f"{info['name']}: {', '.join(parts)}"


@dataclass(frozen=True)
class FileStats:
    """What came from one raw file."""

    tokens: int
    """In samples, end-of-text tokens included."""
    documents: int
    """That begin in a sample."""


@dataclass(frozen=True)
class DatasetStats:
    """Numbers of a dataset."""

    dataset: ShardedDataset
    shard_bytes: int
    """Size of all shards, by the manifest."""
    files: dict[str, FileStats]
    """By raw file, from the provenance; empty where there is none."""
    document_tokens: dict[float, int]
    """Quantiles of the tokens per document, its end-of-text included, over whole documents; likewise."""

    @property
    def bytes_per_token(self) -> float:
        """Bytes of the shards per stored token."""
        return self.shard_bytes / sum(e.tokens for e in self.dataset.entries)


def dataset_stats(folder: Path) -> DatasetStats:
    """Count a dataset; memory does not grow with the number of its documents.

    Raises:
        MissingInputError: there is no finished dataset, or a provenance file is missing while others are there.
        DataError: a provenance file is damaged.
    """
    dataset = ShardedDataset(folder)
    tokens: dict[str, int] = {}
    documents: dict[str, int] = {}
    histogram = np.zeros(1, np.int64)
    length = 0  # of the document that the shards so far leave open
    if any(provenance_path(dataset, k).exists() for k in range(len(dataset.entries))):
        for k in range(len(dataset.entries)):
            spans = read_spans(dataset, k)
            heads = spans.document_start == 0
            for number, name in enumerate(spans.files):
                own = spans.file == number
                tokens[name] = tokens.get(name, 0) + int(spans.length[own].sum())
                documents[name] = documents.get(name, 0) + int(heads[own].sum())
            bounds = np.append(spans.begin[heads], spans.end)
            lengths = np.diff(bounds)
            if len(lengths):
                histogram = _add(histogram, np.array([length + bounds[0], *lengths[:-1]]))
            length = int(lengths[-1]) if len(lengths) else length + spans.end
        if not dataset.info["totals"]["tail_tokens"]:
            histogram = _add(histogram, np.array([length]))
    histogram[0] = 0  # where a shard begins with a document nothing was open
    counts = np.cumsum(histogram)
    ranks = {q: int(np.ceil(q * (counts[-1] - 1))) for q in QUANTILES} if counts[-1] else {}
    return DatasetStats(
        dataset,
        sum(e.bytes for e in dataset.entries),
        {name: FileStats(tokens[name], documents[name]) for name in sorted(tokens)},
        {q: int(np.searchsorted(counts, rank, side="right")) for q, rank in ranks.items()},
    )


def _add(histogram: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    more = np.bincount(lengths, minlength=len(histogram))
    more[: len(histogram)] += histogram
    return more


_HASHES_AT_ONCE = 1 << 26
"""512 MB."""


def exact_duplicates(folder: Path) -> tuple[int, int]:
    """Documents whose tokens an earlier one has too, and all that were compared: those that end in a sample.

    By 64 bits of a hash: of 1e9 documents 0.03 would count by chance. Reads the shards once; of more than
    `_HASHES_AT_ONCE` documents once for each so many.

    Raises:
        MissingInputError: there is no finished dataset, or its provenance is not here.
        DataError: a shard is damaged.
    """
    dataset = ShardedDataset(folder)
    parts = max(1, -(-dataset.info["totals"]["documents"] // _HASHES_AT_ONCE))
    duplicates = compared = 0
    for part in range(parts):
        of_part = (h for h in _document_hashes(dataset) if h % parts == part)
        hashes = np.fromiter(of_part, np.uint64)
        compared += len(hashes)
        duplicates += len(hashes) - len(np.unique(hashes))
    return duplicates, compared


def _document_hashes(dataset: ShardedDataset) -> Iterator[int]:
    """64 bits of each document that ends in a sample, by its ids."""
    hasher = None
    for k in range(len(dataset.entries)):
        spans, ids = read_spans(dataset, k), shard_tokens(dataset, k)
        starts = set(spans.begin[spans.document_start == 0].tolist())
        bounds = [*sorted(starts | {0}), spans.end]
        for begin, end in zip(bounds, bounds[1:]):
            if begin in starts:
                if hasher:
                    yield int.from_bytes(hasher.digest(), "little")
                hasher = blake2b(digest_size=8)
            if hasher:
                hasher.update(ids[begin:end].tobytes())
    if hasher and not dataset.info["totals"]["tail_tokens"]:
        yield int.from_bytes(hasher.digest(), "little")


@dataclass(frozen=True)
class SampleSpan:
    """A part of a sample that comes from one document, or padding."""

    start: int
    """First token in the sample."""
    ids: np.ndarray
    file: str | None
    """Name of the raw file; None for padding."""
    record: int | None
    document_start: int | None
    """Token of the document where this part starts."""


def sample_spans(folder: Path, sample: int) -> list[SampleSpan]:
    """The documents that sample `sample` (counted from 0) is made of, in order.

    Raises:
        ConfigError: the dataset has no such sample.
        MissingInputError: there is no finished dataset, or no provenance.
        DataError: the shard or its provenance is damaged.
    """
    dataset = ShardedDataset(folder)
    if not 0 <= sample < len(dataset):
        raise ConfigError(f"{folder} has samples 0 to {len(dataset) - 1}, and no sample {sample}")
    k = int(np.searchsorted(np.cumsum(dataset.shard_sizes), sample, side="right"))
    spans, ids, width = read_spans(dataset, k, sample), dataset[sample], dataset.format.sample_tokens
    begin = (sample - int(dataset.shard_sizes[:k].sum())) * width
    found = []
    for row in np.flatnonzero((spans.begin >= begin) & (spans.begin < begin + width)).tolist():
        start, length = int(spans.begin[row]) - begin, int(spans.length[row])
        part = ids[start : start + length]
        found.append(SampleSpan(start, part, *spans.document(row), int(spans.document_start[row])))
    covered = found[-1].start + len(found[-1].ids) if found else 0
    if covered < width:
        found.append(SampleSpan(covered, ids[covered:], None, None, None))
    return found


def tokenizer_of(folder: Path, given: Path | None = None) -> Path:
    """The `tokenizer.json` that the dataset in `folder` was made with, found by name beside it or under `OPENLM_HOME`.

    Args:
        given: the file, or a folder that holds it, instead of looking.

    Raises:
        MissingInputError: it is not found.
        IdentityError: the given one is another.
    """
    about = ShardedDataset(folder).info["tokenizer"]
    beside = folder.absolute()
    # A recipe's dataset, one of `openlm tokenize --input-files`, or one that was copied to a place of its own.
    homes = [*beside.parents[2:3], beside.parent / "work", Home.from_env().root]
    folders = [given] if given else [Home(home).tokenizer(about["name"]) for home in map(Path, homes)]
    paths = [path / "tokenizer.json" if path.is_dir() else path for path in folders]
    present = [path for path in paths if path.is_file()]
    for path in present:
        if sha256_file(path) == about["sha256"]:
            return path
    if given and present:
        raise IdentityError(
            f"{present[0]} is not the tokenizer {about['name']} that {folder} was made with: its sha256 is not "
            f"{about['sha256']}"
        )
    looked = ", ".join(map(str, paths))
    raise MissingInputError(f"the tokenizer {about['name']} of {folder} is not at {looked}; name its tokenizer.json")
