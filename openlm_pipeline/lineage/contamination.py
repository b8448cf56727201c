"""Which items of a suite a run has read: shards are scanned once, and each run and milestone is joined to that.

A scan is one Parquet file a shard, of `COLUMNS`: occurrences of windows of the suite's items. It depends on the shard,
the suite's files and the rule alone, so a dataset that extends another reuses its scan, and so does a part of one.

The join is by the order of the samples, which is a pure function that can be inverted (`ordering.continued.seen`).
Sample i of a run (from 0, its parents' included) is read when (i + 1) * seq_len tokens are; a window that runs on from
one sample into the next, as soon as both are. Samples of steps that the trainer left out count as read.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from openlm_pipeline.errors import ConfigError, DataError, MissingInputError
from openlm_pipeline.evaluation.estimates import accuracy, cluster_codes, unpaired_difference
from openlm_pipeline.experiments import Dataset
from openlm_pipeline.fingerprint import fingerprint
from openlm_pipeline.lineage.suite_windows import AGAIN, SuiteWindows, load_windows
from openlm_pipeline.lineage.windows import TokenCharacters, Windows
from openlm_pipeline.ordering.continued import Sizes, seen
from openlm_pipeline.pools import Call, PoolFactory, TaskProgress
from openlm_pipeline.result import Say
from openlm_pipeline.shards.dataset import ShardedDataset
from openlm_pipeline.shards.opening import Opened, open_dataset, segments_of
from openlm_pipeline.shards.provenance import read_spans
from openlm_pipeline.shards.synthetic import SyntheticDataset
from openlm_pipeline.storage.files import folder_lock, remove_leftovers
from openlm_pipeline.storage.home import Home
from openlm_pipeline.storage.tables import read_table, write_table
from openlm_pipeline.tokenization.tasks import Meter, raise_all, run_all
from openlm_pipeline.tokenizers.token_bytes import texts_of_ids, tokenizer_json

COLUMNS = {
    "window": (pa.uint64(), "Hash of the window."),
    "sample": (pa.int64(), "Sample in which it begins: its number in the segment of the dataset."),
    "last_sample": (pa.int64(), "Sample in which it ends."),
    "token": (pa.int32(), "Token of the first sample in which it begins."),
    "document": (pa.int32(), "Number of the document among those that begin in the shard; 0 is one before them."),
}
_SCHEMA = pa.schema([pa.field(n, kind, False, {"description": about}) for n, (kind, about) in COLUMNS.items()])
BOILERPLATE = 10
"""A window of several items that stands in more documents than this is boilerplate, and counts for nothing."""
MOST_ROWS = 1000
"""Occurrences of a window in one shard that are kept."""
TOO_SHORT, CLEAN, SEEN = "too short to tell", "clean", "seen"


def segments(opened: Opened) -> list[tuple[ShardedDataset, int]]:
    """The parts of a dataset with shards of their own, and how many shards of each are in it.

    Raises:
        ConfigError: its samples are made up.
    """
    if isinstance(opened, SyntheticDataset):
        raise ConfigError(f"{opened.folder} are random ids, which hold no text to look for")
    left, found = len(opened.entries), []
    for segment, _ in segments_of(opened):
        found.append((segment, min(left, len(segment.entries))))
        left -= found[-1][1]
    return found


@dataclass(frozen=True)
class ScanOf:
    """The scan of a dataset for a suite's windows: where it is, and what of it there must be."""

    dataset: Dataset
    opened: Opened
    suite: str
    windows: SuiteWindows
    home: Home

    def folder(self, segment: ShardedDataset) -> Path:
        version = segment.info.get("version", self.dataset.version)
        return self.home.scan(self.dataset.name, version, self.suite, self.windows.rule.name)

    def identity(self, segment: ShardedDataset, k: int) -> dict[str, Any]:
        """What the file of a shard is made from."""
        entry, before = segment.entries[k], segment.entries[k - 1].sha256 if k else None
        tokenizer = segment.info["tokenizer"]["sha256"]
        return {"windows": self.windows.fingerprint, "tokenizer": tokenizer, "shard": entry.sha256, "before": before}

    def shards(self) -> list[tuple[int, ShardedDataset, int, Path]]:
        """(number of the segment, segment, shard of it, its file) of each shard."""
        return [
            (s, segment, k, self.folder(segment) / f"{segment.entries[k].shard}.parquet")
            for s, (segment, count) in enumerate(segments(self.opened))
            for k in range(count)
        ]

    def missing(self) -> list[tuple[int, ShardedDataset, int, Path]]:
        """Those of `shards` that are not scanned, or were something else then, or whose file is damaged."""
        found = []
        for shard in self.shards():
            try:
                if self.read(shard) is not None:
                    continue
            except DataError:
                pass  # it is made again
            found.append(shard)
        return found

    def read(self, shard: tuple[int, ShardedDataset, int, Path]) -> tuple[pa.Table, dict[str, Any]] | None:
        """What was found in one of `shards`, and what its file says of itself; None where it is of something else.

        Raises:
            DataError: the file is damaged.
        """
        _, segment, k, path = shard
        try:
            table, facts = read_table(path, again=AGAIN)
        except MissingInputError:
            return None
        return (table, facts) if facts.get("of") == self.identity(segment, k) else None

    @property
    def version(self) -> str:
        """Equal for equal datasets and windows."""
        return fingerprint({"dataset": self.opened.version, "windows": self.windows.fingerprint})


def scan(of: ScanOf, pools: PoolFactory, report: Say) -> int:
    """Scan the shards of a dataset that are not scanned yet, each a task of the pool; return how many.

    Raises:
        DataError: a shard is damaged.
        BusyError: another process is scanning it.
    """
    with folder_lock(of.folder(segments(of.opened)[-1][0]), "looking for items"):
        missing = of.missing()
        if not missing:
            return 0
        for folder in {path.parent for *_, path in missing}:
            remove_leftovers(folder) if folder.exists() else None
        found = of.home.windows(of.suite, of.windows.rule.name)
        calls: dict[str, Call] = {}
        sizes: dict[str, int] = {}
        for s, segment, k, path in missing:
            name = f"{s}/{segment.entries[k].shard}"
            arguments = (of.dataset, of.home, of.opened.version, s, k, found, of.windows.fingerprint)
            calls[name] = (scan_shard, *arguments, of.identity(segment, k), path)
            sizes[name] = segment.entries[k].bytes
        with pools(report) as pool:
            meter = Meter(f"looking for items of {of.suite} in {of.dataset.name}", sum(sizes.values()), report)
            raise_all(run_all(pool, meter, sizes, calls)[1])
            meter.say()
    return len(missing)


@lru_cache(maxsize=2)
def _to_find(folder: Path, fingerprint: str) -> tuple[Windows, dict[str, TokenCharacters]]:
    found = load_windows(folder)
    if found.fingerprint != fingerprint:
        raise DataError(f"{folder} has the windows of other task files now; run the command again")
    return found.to_find(), {}


@lru_cache(maxsize=4)
def _opened(dataset: str, home: Home, version: str) -> Opened:
    return open_dataset(Dataset.model_validate_json(dataset), home)


def scan_shard(
    dataset: Dataset,
    home: Home,
    version: str,
    segment: int,
    k: int,
    windows: Path,
    windows_fingerprint: str,
    identity: Mapping[str, Any],
    path: Path,
    *,
    progress: TaskProgress,
) -> int:
    """Write the file of a shard; return its tokens. Runs in a worker.

    Args:
        version: of the dataset, so that one that was made again is opened again.
        windows: folder of the suite's.

    Raises:
        DataError: the shard is damaged.
    """
    home.pull(windows)
    to_find, tables = _to_find(windows, windows_fingerprint)
    part, _ = segments(_opened(dataset.model_dump_json(), home, version))[segment]
    info = part.info
    tokenizer = tokenizer_json(dataset.tokenizer, home.tokenizer(dataset.tokenizer.name), info["tokenizer"]["sha256"])
    begun = time.process_time()
    key = f"{tokenizer} {info['eot_id']}"
    if key not in tables:
        texts = texts_of_ids(tokenizer)
        texts[info["eot_id"]] = None  # it ends a document, special or not
        tables[key] = TokenCharacters(texts, to_find.rule)
    width, first = part.format.sample_tokens, int(part.shard_sizes[:k].sum())
    before = min(first, -(-to_find.reach(tables[key]) // width)) if k else 0
    own = part.shard_samples(k)
    tail = part.gather(np.arange(first - before, first)) if before else own[:0]
    ids = np.concatenate([tail.reshape(-1), own.reshape(-1)])
    found = np.stack(to_find.find(ids, tables[key]))
    found = found[:, found[2] >= before * width]  # others are the shard's before
    numbers, begin, end = found[:, np.lexsort((found[1], found[0]))]
    nth = np.arange(len(numbers)) - np.searchsorted(numbers, numbers)
    kept = nth < MOST_ROWS
    numbers, begin, end = numbers[kept], begin[kept], end[kept]
    document = np.searchsorted(np.flatnonzero(ids == info["eot_id"]), begin)
    of_first = first - before
    columns = (to_find.hashes[numbers], of_first + begin // width, of_first + end // width, begin % width, document)
    table = pa.table([pa.array(c, kind) for c, (kind, _) in zip(columns, COLUMNS.values())], schema=_SCHEMA)
    facts = {"of": identity, "tokens": own.size, "left_out": int((~kept).sum())}
    facts["seconds"] = round(time.process_time() - begun, 3)
    write_table(path, table, facts, shared=True)
    progress({"raw_bytes": own.nbytes, "tokens": own.size})
    return own.size


@dataclass
class Occurrences:
    """What a scan found, in the order of the shards; arrays of the same length."""

    window: np.ndarray
    """uint64: hash."""
    sample: np.ndarray
    """int64: number in the dataset."""
    last_sample: np.ndarray
    document: np.ndarray
    """int64: the same for those in one document, as far as it is in one shard."""
    facts: dict[str, Any] = field(default_factory=dict)
    """`tokens`, CPU `seconds` and `left_out` of the whole scan."""


def read_scan(of: ScanOf) -> Occurrences | None:
    """The occurrences in a dataset, or in the part of it that it is; None where not all of it is scanned.

    Raises:
        DataError: a shard's file is damaged.
    """
    parts: list[tuple[np.ndarray, ...]] = []
    facts = {"tokens": 0, "seconds": 0.0, "left_out": 0}
    firsts = np.cumsum([0, *(len(segment) for segment, _ in segments(of.opened))])
    for n, shard in enumerate(of.shards()):
        if (read := of.read(shard)) is None:
            return None
        s, (table, recorded) = shard[0], read
        facts = {name: facts[name] + recorded[name] for name in facts}
        window, sample, last, _, document = (table[name].to_numpy() for name in COLUMNS)
        parts.append((window, sample + firsts[s], last + firsts[s], document.astype(np.int64) + (n << 32)))
    window, sample, last, document = map(np.concatenate, zip(*parts))
    inside = last < len(of.opened)
    return Occurrences(window[inside], sample[inside], last[inside], document[inside], facts)


def documents_with(of: ScanOf, dropped: np.ndarray) -> dict[tuple[str, int], np.ndarray]:
    """(raw file, record) -> hashes of the windows that stand in it, of each document that has some.

    Args:
        dropped: hashes that don't count.

    Raises:
        MissingInputError: a shard's provenance is not there.
        DataError: it, or a shard's file, is damaged.
    """
    found: dict[tuple[str, int], list[int]] = {}
    for _, segment, _, path in of.shards():
        table, _ = read_table(path, again=AGAIN)
        window, sample, token = (table[name].to_numpy() for name in ("window", "sample", "token"))
        width, first = segment.format.sample_tokens, segment.shard_sizes.cumsum()
        for j in np.unique(np.searchsorted(first, sample, side="right")).tolist():  # its own, or the one before
            spans, begin = read_spans(segment, j), int(first[j] - segment.shard_sizes[j])
            here = (sample >= begin) & (sample < first[j]) & ~np.isin(window, dropped)
            rows = np.searchsorted(spans.begin, (sample[here] - begin) * width + token[here], side="right") - 1
            for row, of_row in zip(rows.tolist(), window[here].tolist()):
                found.setdefault(spans.document(row), []).append(of_row)
    return {document: np.unique(np.array(hashes, np.uint64)) for document, hashes in sorted(found.items())}


def boilerplate(windows: SuiteWindows, found: Sequence[Occurrences]) -> np.ndarray:
    """Hashes of windows that several items have, and more than `BOILERPLATE` documents of all datasets together."""
    shared = windows.distinct[0][windows.in_many()]
    counts = np.zeros(len(shared), np.int64)
    for one in found:
        which = np.isin(one.window, shared)
        pairs = np.unique(np.stack([one.window[which], one.document[which].view(np.uint64)], 1), axis=0)
        counts += np.bincount(np.searchsorted(shared, pairs[:, 0]), minlength=len(shared))
    return shared[counts > BOILERPLATE]


def join(
    windows: SuiteWindows,
    found: Mapping[str, Occurrences],
    record: Mapping[str, Any],
    sizes: Sizes,
    seq_len: int,
    tokens: int,
) -> tuple[pa.Table, dict[str, Any]]:
    """What a run has read of each item after so many tokens.

    Args:
        found: sha256 of a dataset's manifest -> the occurrences in it, of all that the run and its parents read.
        record: `order_record` of the run.

    Returns:
        One row an item: `task`, `item`, `item_hash`, `verdict`, `first_seen_tokens` (null where it is not seen),
        `overlap` (share of its windows that were read; null where there is none to tell by), the same of its question
        and of what has some of its answer, and `times_seen` (of its most frequent window). And numbers of windows.
    """
    dropped = boilerplate(windows, list(found.values()))
    never = np.iinfo(np.int64).max
    hashes, firsts, times = [np.zeros(0, np.uint64)], [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    for dataset, of in found.items():
        kept = ~np.isin(of.window, dropped)
        begin, end = of.sample[kept], of.last_sample[kept]
        samples = np.unique(np.concatenate([begin, end]))
        index, places = seen(record, sizes, dataset, samples, tokens // seq_len)
        first, count = np.full(len(samples), never), np.bincount(index, minlength=len(samples))
        np.minimum.at(first, index, places)
        begin, end = np.searchsorted(samples, begin), np.searchsorted(samples, end)
        hashes.append(of.window[kept])
        firsts.append(np.maximum(first[begin], first[end]))
        times.append(np.minimum(count[begin], count[end]))
    window, first, count = map(np.concatenate, (hashes, firsts, times))
    read = first < never
    known, which = np.unique(window[read], return_inverse=True)
    first_of, times_of = np.full(len(known), never), np.zeros(len(known), np.int64)
    np.minimum.at(first_of, which, first[read])
    np.add.at(times_of, which, count[read])
    rows = np.flatnonzero(np.isin(windows.hashes, known))
    of_row, item = np.searchsorted(known, windows.hashes[rows]), windows.item[rows]
    first_seen, times_seen = np.full(len(windows.row), never), np.zeros(len(windows.row), np.int64)
    np.minimum.at(first_seen, item, first_of[of_row])
    np.maximum.at(times_seen, item, times_of[of_row])
    counts = windows.counts(np.flatnonzero(~np.isin(windows.hashes, dropped)))
    shares = np.concatenate([windows.counts(rows), windows.counts(rows).sum(1, keepdims=True)], 1, dtype=float)
    of_all = np.concatenate([counts, counts.sum(1, keepdims=True)], 1)
    shares = np.divide(shares, of_all, out=np.full(shares.shape, np.nan), where=of_all > 0)
    is_seen = first_seen < never
    verdict = np.where(is_seen, SEEN, np.where(of_all[:, 2] > 0, CLEAN, TOO_SHORT))
    table = pa.table(
        {
            "task": pa.array(np.array(windows.tasks)[windows.task]),
            "item": windows.row,
            "item_hash": pa.array([h.decode() for h in windows.item_hash.tolist()]),
            "verdict": pa.array(verdict),
            "first_seen_tokens": pa.array((np.where(is_seen, first_seen, 0) + 1) * seq_len, mask=~is_seen),
            **{
                name: pa.array(shares[:, k], from_pandas=True)
                for k, name in ((2, "overlap"), (0, "overlap_question"), (1, "overlap_answer"))
            },
            "times_seen": times_seen,
        }
    )
    facts = {
        "boilerplate_windows": len(dropped),
        "windows_read": len(known),
        "left_out": sum(of.facts["left_out"] for of in found.values()),
    }
    return table, facts


def by_task(table: pa.Table, items: pa.Table | None) -> list[dict[str, Any]]:
    """The items of each task by their verdict, with the accuracy of those seen and clean where it is scored.

    Args:
        table: of `join`.
        items: the per-item table of the same milestone.

    Returns:
        A row a task, of several numbers of solved rows each; `difference` is the accuracy of seen items minus that of
        clean ones, with its 95% interval.
    """
    found = []
    for task in dict.fromkeys(table["task"].to_pylist()):
        of = table.filter(pc.equal(table["task"], task))
        verdicts = of["verdict"].to_pylist()
        row: dict[str, Any] = {"task": task, "items": len(verdicts), "seen": verdicts.count(SEEN)}
        row |= {"clean": verdicts.count(CLEAN), "too_short": verdicts.count(TOO_SHORT)}
        row["share_seen"] = row["seen"] / len(verdicts)
        scored = items.filter(pc.equal(items["task"], task)) if items is not None else None
        shots = sorted(set(scored["num_fewshot"].to_pylist())) if scored is not None else []
        found += [row | _accuracies(of, scored, k) for k in shots] or [row]
    return found


def _accuracies(table: pa.Table, scored: pa.Table, k: int) -> dict[str, Any]:
    scored = scored.filter(pc.and_(pc.equal(scored["num_fewshot"], k), pc.is_valid(scored["correct"])))
    verdicts = dict(zip(table["item_hash"].to_pylist(), table["verdict"].to_pylist()))
    of = np.array([verdicts.get(h, "") for h in scored["item_hash"].to_pylist()], object)
    correct, clusters = scored["correct"].to_numpy(zero_copy_only=False).astype(bool), cluster_codes(scored)
    found: dict[str, Any] = {"num_fewshot": k}
    both = {v: accuracy(correct[of == v], clusters[of == v]) for v in (SEEN, CLEAN) if (of == v).any()}
    for verdict, one in both.items():
        found |= {f"accuracy_{verdict}": one.value, f"{verdict}_low": one.low, f"{verdict}_high": one.high}
    if len(both) == 2:
        value, low, high = unpaired_difference(both[SEEN], both[CLEAN])
        found |= {"difference": value, "difference_low": low, "difference_high": high}
    return found
