"""Whether no record and no token of a run was lost or counted twice, from its raw files to its last step.

Each number of an equation comes from another place: raw files that are read again, the records of stage 1, the index of
documents, the manifest, provenance, and the order of samples gone through from the first to the last.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import orjson

from openlm_pipeline.checkpoints.folders import COMPLETE, read_checkpoint
from openlm_pipeline.corpus.discovery import RawFile, discover
from openlm_pipeline.corpus.reader import RecordReader
from openlm_pipeline.errors import DataError, MissingInputError
from openlm_pipeline.lineage.run_order import RunOrder, Source
from openlm_pipeline.ordering.continued import recorded_order
from openlm_pipeline.runs.folder import RunFolder
from openlm_pipeline.shards.dataset import ShardedDataset
from openlm_pipeline.shards.document_index import has_provenance, indexed
from openlm_pipeline.shards.manifest import QUARANTINE
from openlm_pipeline.shards.opening import segments_of
from openlm_pipeline.shards.provenance import spans_of
from openlm_pipeline.storage.home import Home
from openlm_pipeline.tokenization.documents import FileTokens, results

_AT_ONCE = 1 << 16
"""Samples of the order that are counted at a time."""


@dataclass(frozen=True)
class Equation:
    """Two sums that must be equal."""

    name: str
    left: dict[str, int] = field(default_factory=dict)
    """Number by what it is of; likewise on the right."""
    right: dict[str, int] = field(default_factory=dict)
    note: str = ""
    """Why there is nothing to compare, or what else is to be known."""

    @property
    def state(self) -> Literal["ok", "differs", "not here"]:
        if not self.left:
            return "not here"
        return "ok" if sum(self.left.values()) == sum(self.right.values()) else "differs"

    def line(self) -> str:
        """For people: `ok  records of a.jsonl: 30 in the raw file = 28 packed + 1 quarantined + 1 dropped`."""
        sides = (" + ".join(f"{n:,} {what}" for what, n in side.items()) for side in (self.left, self.right))
        said = " = ".join(sides).replace("+ -", "- ") if self.left else ""
        return f"{self.state:<8} {self.name}: {said}{'; ' if said and self.note else ''}{self.note}"


def conserved(run: RunFolder, home: Home, told: Callable[[str], None] = lambda what: None) -> list[Equation]:
    """The equations of a run.

    Reads all of its raw files that are here, and goes through all samples it was trained on: 2M of them, or 100 MB of
    raw text, a second. Memory: 2 bytes a sample of its datasets.

    Args:
        told: what is being counted.

    Raises:
        MissingInputError: the run, or a dataset of it, is not there.
        DataError: a file on the way is damaged.
    """
    order = RunOrder(run, home)
    found = [e for source in order.sources.values() for e in _of_dataset(source, home, told)]
    return [*found, *_of_training(order, told)]


def _of_dataset(source: Source, home: Home, told: Callable[[str], None]) -> Iterator[Equation]:
    if not (segments := segments_of(source.opened)):
        yield Equation(f"records of {source.name}", note="its samples are made up as they are read")
    for segment, _ in segments:
        name = f"{segment.info['name']}/{segment.info.get('version', '')}"
        if segment.info.get("inputs"):
            yield from _records(segment, name, source, home, told)
        else:
            yield Equation(f"records of {source.name}", note="its shards are ready-made: nothing says what they were")
        yield from _tokens(segment, name, told)


def _records(
    segment: ShardedDataset, name: str, source: Source, home: Home, told: Callable[[str], None]
) -> Iterator[Equation]:
    """Raw records, and what became of them."""
    totals = segment.info["totals"]
    folder = home.tokenized(segment.info["name"], segment.info["version"])
    stage1: dict[str, FileTokens] = {made.name: made for made in results(folder)} if folder.is_dir() else {}
    try:
        raw_files = {raw.name: raw for raw in discover(source.dataset, home)} if source.dataset.source.files else {}
    except MissingInputError:
        raw_files = {}
    packed, bad = indexed(segment), _quarantined(segment)
    counted: Counter[str] = Counter()
    for file in segment.info["inputs"]:
        made = stage1.get(file)
        told(f"{name}: {file}")
        if (raw := raw_files.get(file)) is not None:
            left = {"in the raw file": _count(raw, source.dataset.source.text_key)}
        elif made is not None:
            left = {"that stage 1 read (the raw file is not here)": made.records}
        else:
            yield Equation(f"records of {file}", note="neither the raw file nor the record of its tokens is here")
            continue
        counted["files"] += 1
        counted["records"] += sum(left.values())
        if packed is None or ("dropped" in totals and made is None):
            continue  # only all together
        right = {"packed": packed.get(file, (0, 0))[0], "quarantined": bad[file] if bad is not None else 0}
        if made is not None:
            right |= {"dropped": sum(made.dropped.values())} if made.dropped else {}
            mine = {"packed, by stage 1": made.documents, "quarantined": made.quarantined}
            yield Equation(f"stage 1 of {file}", mine, {k: v for k, v in right.items() if k != "dropped"})
        yield Equation(f"records of {file}", left, right)
    if left_out := segment.info.get("skipped"):
        yield Equation(f"{len(left_out)} raw files of {name}", note=f"left out as damaged: {', '.join(left_out)}")
    kept = {"documents": totals["documents"], "quarantined": totals["quarantined"]}
    kept |= {"dropped": totals["dropped"]} if "dropped" in totals else {}
    if counted["files"] == len(segment.info["inputs"]):
        yield Equation(f"records of {name}", {"in its raw files": counted["records"]}, kept)
    if bad is not None:
        yield Equation(f"quarantine of {name}", {"lines": bad.total()}, {"quarantined": totals["quarantined"]})
    if packed is not None:
        documents = {"documents by the index": sum(n for n, _ in packed.values())}
        yield Equation(f"documents of {name}", documents, {"by dataset.json": totals["documents"]})
    if packed is not None and stage1.keys() >= segment.info["inputs"].keys():
        tokens = {"of stage 1": sum(stage1[file].tokens for file in segment.info["inputs"])}
        yield Equation(f"tokens of {name}", tokens, {"by the index": sum(n for _, n in packed.values())})


def _count(raw: RawFile, text_key: str) -> int:
    """Records of a raw file, good and bad."""
    how = {"text_key": text_key, "max_bad_fraction": 1.0, "on_bad": lambda bad: None, "format": raw.format}
    reader = RecordReader(raw.url, **how)
    for _ in reader:
        pass
    return reader.records + reader.bad


def _quarantined(segment: ShardedDataset) -> Counter[str] | None:
    """Raw file -> lines of the quarantine, which has the files' places; None where it is not here."""
    path = segment.folder / QUARANTINE
    if not path.exists():
        return None
    names = sorted(segment.info["inputs"], key=len, reverse=True)
    found: Counter[str] = Counter()
    with path.open("rb") as lines:
        try:
            places = Counter(orjson.loads(line)["file"] for line in lines)
        except (ValueError, KeyError, TypeError) as e:
            raise DataError(f"{path} is damaged: {e}; `openlm tokenize` makes it again once it is deleted") from e
        for place, count in places.items():
            found[next((n for n in names if f"/{place}".endswith(f"/{n}")), place)] += count
    return found


def _tokens(segment: ShardedDataset, name: str, told: Callable[[str], None]) -> Iterator[Equation]:
    """Tokens in the shards, and where they came from."""
    totals, width = segment.info["totals"], segment.format.sample_tokens
    tail, padding = totals.get("tail_tokens", 0), totals.get("padding_tokens", 0)
    in_shards = sum(entry.tokens for entry in segment.entries)
    yield Equation(
        f"shards of {name}", {"tokens": in_shards}, {f"in {len(segment):,} samples of {width}": len(segment) * width}
    )
    if segment.info.get("inputs") and (packed := indexed(segment)) is not None:
        right = {"in shards": in_shards} | ({"left over": tail} if tail else {})
        right |= {"of padding": -padding} if padding else {}
        yield Equation(f"packed tokens of {name}", {"of documents": sum(n for _, n in packed.values())}, right)
    if has_provenance(segment):
        covered = 0
        for k in range(len(segment.entries)):
            told(f"provenance of {name}: shard {k:,} of {len(segment.entries):,}")
            covered += int(spans_of(segment, k).length.sum())
        yield Equation(
            f"provenance of {name}",
            {"tokens that it covers": covered},
            {"in shards": in_shards} | ({"of padding": -padding} if padding else {}),
        )


def _of_training(order: RunOrder, told: Callable[[str], None]) -> Iterator[Equation]:
    """Steps, samples and tokens that the run was trained on, its parents' included."""
    batch = order.experiment.training.global_batch
    for mark in sorted(order.run.checkpoints.glob(f"step-*/{COMPLETE}")):
        checkpoint = read_checkpoint(mark.parent)
        left, right = (
            {"tokens": checkpoint.tokens},
            {f"in {checkpoint.step:,} steps of {batch:,}": checkpoint.step * batch},
        )
        yield Equation(f"checkpoint {checkpoint.milestone or checkpoint.path.name}", left, right)
    counts = {content: np.zeros(len(source.opened), np.uint16) for content, source in order.sources.items()}
    read: Counter[str] = Counter()
    for stretch in order.stretches:
        contents = [data["manifest_sha256"] for data in stretch.record["data"]]
        if missing := [c for c in contents if c not in counts]:
            yield Equation(f"samples of {stretch.name}", note=f"a dataset of it is not here, {missing[0][:12]}")
            return
        going = recorded_order(stretch.order_record(stretch.end), order.sizes)
        for start in range(stretch.begin, stretch.end, _AT_ONCE):
            told(f"samples of {stretch.name}: {start:,} of {stretch.end:,}")
            sources, samples = going.picks(start, min(_AT_ONCE, stretch.end - start))
            for number in np.unique(sources).tolist():
                mine = samples[sources == number]
                np.add.at(counts[contents[number]], mine, 1)
                read[contents[number]] += len(mine)
    by_source = {f"of {order.sources[content].name}": n for content, n in read.items()}
    same_width = len({stretch.seq_len for stretch in order.stretches}) == 1
    if by_source and same_width:
        samples = order.trained_tokens // order.last.seq_len
        trained = {f"for the {order.trained_tokens:,} tokens trained on": samples}
        yield Equation(f"samples of {order.name}", trained, by_source)
    drawn = any(stretch.record["sampling"] == "resampled" for stretch in order.stretches)
    for content, count in counts.items():
        name, reads = order.sources[content].name, {"reads": read[content]}
        if drawn:
            said = f"drawn with replacement: {(count == 0).sum():,} of {len(count):,} never, one {count.max()} times"
            yield Equation(f"samples of {name}", reads, {"by sample": int(count.sum())}, said)
            continue
        whole = int(count.min())
        right = {f"in {whole} whole epochs": whole * len(count), "in the next": int((count > whole).sum())}
        yield Equation(f"once an epoch each sample of {name}", reads, right)
