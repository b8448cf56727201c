"""Whoever reads a dataset refuses, by name, what is not what was written; and what is lost is made again, alone."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from small_dataset import SmallDataset, documents
from whole_documents import document_tokens, find_document, iterate_documents

from openlm_pipeline.corpus.discovery import discover
from openlm_pipeline.corpus.reader import RecordReader, records_of
from openlm_pipeline.errors import DataError, OpenLMError
from openlm_pipeline.pipeline.plan import plan
from openlm_pipeline.pools import PoolFactory
from openlm_pipeline.shards.dataset import ShardedDataset
from openlm_pipeline.shards.inspect import check_shards, dataset_stats, sample_spans
from openlm_pipeline.shards.manifest import read_manifest, version_of
from openlm_pipeline.shards.provenance import read_spans
from openlm_pipeline.shards.shard_export import export_shards
from openlm_pipeline.storage.files import read_sealed, sha256_file
from openlm_pipeline.tokenization.documents import record_offsets

Small = Callable[..., SmallDataset]


@pytest.fixture
def made(three_files: SmallDataset, inline: PoolFactory) -> SmallDataset:
    three_files.run(inline)
    return three_files


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def read_all(made: SmallDataset) -> None:
    dataset = ShardedDataset(made.shards)
    for first in range(0, len(dataset), 5):
        dataset.gather(np.arange(first, min(first + 5, len(dataset))))


def one_by_one(made: SmallDataset) -> None:
    dataset = ShardedDataset(made.shards)
    for index in range(len(dataset)):
        dataset[index]


def read_twice(made: SmallDataset) -> None:
    dataset = ShardedDataset(made.shards)
    for index in range(len(dataset)):
        dataset.gather(np.array([index, index]))


def read_documents(made: SmallDataset) -> None:
    list(iterate_documents(made.shards))


def export(made: SmallDataset) -> None:
    from openlm_pipeline.pools import DaskSettings

    export_shards(made.shards, made.root / "exported", DaskSettings(workers=1).pool, lambda line: None)


def verify(made: SmallDataset) -> None:
    problems = [problem for _, problem in check_shards(made.shards) if problem]
    if problems:
        raise DataError("\n".join(problems))


def checksums(made: SmallDataset) -> None:
    ShardedDataset(made.shards).verify()


READERS = [read_all, one_by_one, read_twice, read_documents, export, verify, checksums]


def bit_of_a_shard(made: SmallDataset) -> Path:
    dataset = ShardedDataset(made.shards)
    path = made.shards / "00000001.tar"
    flip(path, dataset.format.record_bytes * 3 + 512 + len(dataset.format.npy_header) + 4)
    return path


def swapped_shard(made: SmallDataset) -> Path:
    shutil.copyfile(made.shards / "00000000.tar", made.shards / "00000001.tar")
    return made.shards / "00000001.tar"


def bit_of_the_sums(made: SmallDataset) -> Path:
    flip(made.shards / "00000001.sums", 9)
    return made.shards / "00000001.sums"


def lost_sums(made: SmallDataset) -> Path:
    (made.shards / "00000001.sums").unlink()
    return made.shards / "00000001.sums"


def other_eot(made: SmallDataset) -> Path:
    path = made.shards / "dataset.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "eot_id": 1}, indent=2) + "\n")
    return path


def bit_of_a_count(made: SmallDataset) -> Path:
    path = made.shards / "manifest.jsonl"
    path.write_text(path.read_text().replace('"tokens": 544', '"tokens": 545', 1))
    assert "545" in path.read_text()
    return path


def lost_line(made: SmallDataset) -> Path:
    path = made.shards / "manifest.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    return path


DAMAGE = [bit_of_a_shard, swapped_shard, bit_of_the_sums, lost_sums, other_eot, bit_of_a_count, lost_line]


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("read", READERS)
def test_damage_is_refused_by_name(made: SmallDataset, read: Callable, damage: Callable) -> None:
    read(made)
    shutil.rmtree(made.root / "exported", ignore_errors=True)
    path = damage(made)
    with pytest.raises(OpenLMError, match=str(path)):
        read(made)


def test_another_datasets_provenance_is_refused(made: SmallDataset) -> None:
    path = made.shards / "00000001.provenance.parquet"
    shutil.copyfile(made.shards / "00000000.provenance.parquet", path)
    for read in (read_documents, verify, checksums, lambda m: dataset_stats(m.shards)):
        with pytest.raises(DataError, match=str(path)):
            read(made)
    with pytest.raises(DataError, match=str(path)):
        sample_spans(made.shards, 40)


def test_equal_damage_in_a_pair_is_found_when_a_sample_is_read_twice(made: SmallDataset) -> None:
    bit_of_a_shard(made)
    dataset = ShardedDataset(made.shards)
    index = int(dataset.shard_sizes[0]) + 3
    with pytest.raises(DataError, match="1 of its 32 samples, from sample 3 on"):
        dataset.gather(np.array([index, 0, index]))


LOST = ["00000001.tar", "00000001.sums", "00000001.provenance.parquet", "documents.parquet", "dataset.json"]


@pytest.mark.parametrize("name", LOST)
def test_a_lost_file_is_made_again_and_nothing_else(made: SmallDataset, inline: PoolFactory, name: str) -> None:
    before = made.all_hashes()
    times = {p: p.stat().st_mtime_ns for p in made.shards.iterdir()}
    (made.shards / name).unlink()
    made.run(inline)
    assert made.all_hashes() == before
    written = {p.name for p, time in times.items() if p.stat().st_mtime_ns != time and p.is_file()}
    of_the_shard = {name for name in LOST[:3] if name in before}
    assert written <= (of_the_shard if name in of_the_shard else {name})


def test_a_damaged_dataset_json_is_written_again(made: SmallDataset, inline: PoolFactory) -> None:
    before = made.all_hashes()
    other_eot(made)
    assert made.run(inline).reused
    assert made.all_hashes() == before


@pytest.fixture
def first_release(made: SmallDataset) -> SmallDataset:
    made.make_first_release()
    return made


def test_a_dataset_of_the_first_release_keeps_its_version_and_gets_sums(
    first_release: SmallDataset, inline: PoolFactory, no_client: PoolFactory
) -> None:
    version = sha256_file(first_release.shards / "manifest.jsonl")
    tars = {p: p.stat().st_mtime_ns for p in first_release.shards.glob("*.tar")}
    opened = ShardedDataset(first_release.shards)
    assert opened.version == version and not opened.has_sums
    done = first_release.run(inline)
    assert done.reused and done.version == version
    opened = ShardedDataset(first_release.shards)
    assert opened.version == version and opened.has_sums
    assert {p: p.stat().st_mtime_ns for p in first_release.shards.glob("*.tar")} == tars
    assert version_of(read_manifest(first_release.shards)) == version
    with pytest.raises(DataError, match=str(bit_of_a_shard(first_release))):
        read_all(first_release)
    assert first_release.run(no_client).reused


def test_a_dataset_of_the_first_release_is_as_one_of_this_once_it_has_sums(
    made: SmallDataset, inline: PoolFactory
) -> None:
    before = made.all_hashes()
    made.make_first_release()
    made.run(inline)
    assert made.all_hashes() == before


def test_a_damaged_shard_of_the_first_release_gets_no_sums(first_release: SmallDataset, inline: PoolFactory) -> None:
    path = bit_of_a_shard(first_release)
    with pytest.raises(DataError, match=rf"{path} has sha256 .* it is damaged"):
        first_release.run(inline)
    assert not ShardedDataset(first_release.shards).has_sums
    path.unlink()
    first_release.run(inline)
    read_all(first_release)


def test_documents_are_found_by_their_index(made: SmallDataset) -> None:
    recovered = made.recovered()
    dataset = ShardedDataset(made.shards)
    for (file, record), ids in recovered.items():
        start, tokens = find_document(dataset, file, record)
        if start + tokens <= len(dataset) * dataset.format.sample_tokens:
            assert document_tokens(made.shards, file, record).tolist() == ids[:-1]
            assert tokens == len(ids)
    assert sum(1 for _ in iterate_documents(made.shards)) >= len(recovered) - 2


def test_an_index_of_other_documents_is_refused(made: SmallDataset) -> None:
    path = made.shards / "documents.parquet"
    table = pq.read_table(path)
    pq.write_table(table.set_column(2, "start", [table["start"].to_numpy() + 1]), path)
    with pytest.raises(DataError, match=str(path)):
        verify(made)


def test_a_step_reads_few_rows_of_a_provenance(small: Small, inline: PoolFactory) -> None:
    long = small(settings={"samples_per_shard": 100_000})
    long.write({"a.jsonl": documents(12_000)})
    long.run(inline)
    dataset = ShardedDataset(long.shards)
    assert len(dataset.entries) == 1
    whole = read_spans(dataset, 0)
    middle = len(dataset) // 2
    part = read_spans(dataset, 0, middle)
    assert len(part) < len(whole) / 2
    width = dataset.format.sample_tokens
    own = lambda spans: (spans.begin >= middle * width) & (spans.begin < (middle + 1) * width)  # noqa: E731
    assert part.record[own(part)].tolist() == whole.record[own(whole)].tolist()


def test_offsets_lead_to_the_raw_records(made: SmallDataset) -> None:
    for raw in discover(made.dataset, made.home):
        offsets = record_offsets(made.tokenized, raw.name, range(10))
        whole = {r.number: r.text for r in RecordReader(raw.url, on_bad=lambda bad: None, max_bad_fraction=1.0)}
        wanted = {number: text for number, text in whole.items() if number < 10}
        assert offsets.keys() == wanted.keys() and None not in offsets.values()
        for known in (offsets, dict.fromkeys(wanted)):
            assert {n: record.text for n, record in records_of(raw.url, known).items()} == wanted


@pytest.mark.parametrize("field", ["documents", "text_bytes", "tokens_sha256", "engine", "quarantined"])
def test_a_changed_word_of_a_streams_json_is_refused(made: SmallDataset, inline: PoolFactory, field: str) -> None:
    path = made.tokenized / "a.jsonl.json"
    value = json.loads(path.read_text())
    value[field] = value[field] + 1 if isinstance(value[field], int) else "x" + value[field][1:]
    path.write_text(json.dumps(value, indent=2) + "\n")
    with pytest.raises(DataError, match=str(path)):
        made.run(inline)
    path.unlink()
    made.run(inline)
    assert read_sealed(path)["documents"] == json.loads(path.read_text())["documents"]


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (other_eot, r"dataset\.json is not the one that .*manifest\.jsonl was written with"),
        (lost_line, r"manifest\.jsonl is damaged"),
        (lost_sums, r"1 shards are missing or not whole, and alone are made again: 00000001\.tar"),
        (lambda made: (made.shards / "documents.parquet").unlink(), r"documents\.parquet is missing, and alone"),
        (lambda made: (made.shards / "dataset.json").unlink(), r"dataset\.json does not exist"),
    ],
)
def test_the_plan_says_what_is_damaged_or_lost(made: SmallDataset, damage: Callable, why: str) -> None:
    def states() -> dict[str, tuple[str, str]]:
        return {a.name: (a.state, "; ".join(a.why)) for a in plan(made.experiment, made.home).artefacts}

    assert states()["shards/text"] == ("fresh", "")
    damage(made)
    state, reason = states()["shards/text"]
    assert state == "stale" and re.search(why, reason)


def test_another_release_of_the_parquet_library_may_write_other_bytes(made: SmallDataset, inline: PoolFactory) -> None:
    """What is lost is made again then too; the manifest follows, and the version stays."""
    first = made.run(inline)
    for name in ("00000001.provenance.parquet", "documents.parquet"):
        path = made.shards / name
        pq.write_table(pq.read_table(path), path, compression="gzip")
        manifest = made.shards / "manifest.jsonl"
        old = sha256_file(path)
        made.make_first_release() if name == "documents.parquet" else made.reseal()
        made.run(inline)
        path.unlink()
        again = made.run(inline)
        assert again.version == first.version and old not in manifest.read_text()
        verify(made)
