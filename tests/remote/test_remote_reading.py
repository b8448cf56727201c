"""Raw files read over a faulty network: every record, or an error; never a short file."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from faulty_s3 import CUT, FLIP, SHORT, STALL, Bucket

from openlm_pipeline.corpus.blocks import BLOCK_BYTES
from openlm_pipeline.corpus.discovery import discover, restat
from openlm_pipeline.corpus.reader import Part, RecordReader
from openlm_pipeline.errors import DataError, MissingInputError
from openlm_pipeline.experiments import Dataset
from openlm_pipeline.experiments.spec import Source, TokenizerSpec
from openlm_pipeline.storage import remote
from openlm_pipeline.storage.home import Home

TEXTS = [f"{n}: " + "text " * (n % 50) for n in range(3000)]
LINES = b"".join(json.dumps({"text": text}).encode() + b"\n" for text in TEXTS)
RANGE_BYTES = 100_000


def parquet() -> bytes:
    out = pa.BufferOutputStream()
    pq.write_table(pa.table({"text": TEXTS}), out, row_group_size=500)
    return out.getvalue().to_pybytes()


CONTENTS: dict[str, Callable[[], bytes]] = {
    "a.jsonl": lambda: LINES,
    "a.jsonl.zst": lambda: zstandard.compress(LINES, 1),
    "a.jsonl.gz": lambda: gzip.compress(LINES),
    "a.parquet": parquet,
}


@pytest.fixture(autouse=True)
def small_ranges(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that small files take several requests."""
    monkeypatch.setattr(remote, "_RANGE_BYTES", RANGE_BYTES)


def texts(url: str, part: Part | None = None) -> list[str]:
    bad: list[object] = []
    reader = RecordReader(url, on_bad=bad.append, part=part) if part else RecordReader(url, on_bad=bad.append)
    found = [record.text for record in reader]
    assert bad == []
    return found


@pytest.mark.parametrize("name", CONTENTS)
@pytest.mark.parametrize("protocol", ["s3", "http"])
def test_every_record_is_read(bucket: Bucket, name: str, protocol: str) -> None:
    bucket.put(name, CONTENTS[name]())
    assert texts(f"{bucket.url if protocol == 's3' else bucket.http_url}/{name}") == TEXTS


def test_parts_of_a_remote_file_are_all_of_it(bucket: Bucket) -> None:
    bucket.put("a.jsonl", LINES)
    parts = [Part(0, BLOCK_BYTES), Part(BLOCK_BYTES, 2 * BLOCK_BYTES), Part(2 * BLOCK_BYTES)]
    assert sum((texts(f"{bucket.url}/a.jsonl", part) for part in parts), []) == TEXTS


@pytest.mark.parametrize("fault", [CUT, SHORT, FLIP, STALL, "500", "503"])
@pytest.mark.parametrize("name", ["a.jsonl"])
def test_s3_is_asked_again_for_what_did_not_come_whole(bucket: Bucket, name: str, fault: str) -> None:
    bucket.put(name, CONTENTS[name]())
    bucket.faults.set(fault, 2 if fault == CUT else 1)
    assert texts(f"{bucket.url}/{name}") == TEXTS
    assert bucket.faults.met


@pytest.mark.parametrize("fault", [CUT, FLIP, "500"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_s3_that_never_answers_whole_is_an_error(bucket: Bucket, name: str, fault: str) -> None:
    bucket.put(name, CONTENTS[name]())
    bucket.faults.set(fault, 10**6)
    with pytest.raises(DataError, match=f"raw file {bucket.url}/{name}"):
        texts(f"{bucket.url}/{name}")


@pytest.mark.parametrize("fault", [CUT, SHORT, STALL, "500"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_http_that_fails_in_the_middle_is_read_whole_or_an_error(bucket: Bucket, name: str, fault: str) -> None:
    bucket.put(name, CONTENTS[name]())
    url = f"{bucket.http_url}/{name}"
    bucket.faults.set(fault)
    try:
        found = texts(url)
    except DataError as e:
        assert f"raw file {url}" in str(e)
    else:
        assert found == TEXTS
    assert bucket.faults.met == 1


def test_a_file_that_is_cut_in_the_store_while_it_is_read_is_an_error_with_both_sizes(bucket: Bucket) -> None:
    size = 20 * RANGE_BYTES
    bucket.put("a.jsonl", bytes(size))
    with remote.open_remote(f"{bucket.http_url}/a.jsonl") as file:
        file.read(1)
        bucket.put("a.jsonl", bytes(size - 1))
        with pytest.raises(OSError, match=rf"it ends at byte {size - 1}, but its size is {size}"):
            file.read()


def test_an_object_replaced_while_it_is_read_is_an_error(bucket: Bucket) -> None:
    bucket.put("a.jsonl", bytes(20 * RANGE_BYTES))
    with remote.open_remote(f"{bucket.url}/a.jsonl") as file:
        file.read(1)
        bucket.put("a.jsonl", bytes([1]) * 20 * RANGE_BYTES)
        with pytest.raises(OSError, match="no longer exists"):
            file.read()


def test_a_missing_file_and_a_server_that_is_down_are_told_apart(bucket: Bucket) -> None:
    for url in (f"{bucket.url}/a.jsonl", f"{bucket.http_url}/a.jsonl"):
        with pytest.raises(MissingInputError, match=f"raw file {url} does not exist"):
            texts(url)
    with pytest.raises(DataError, match="raw file http://127.0.0.1:9/a.jsonl can't be opened"):
        texts("http://127.0.0.1:9/a.jsonl")


def test_many_files_under_one_pattern_are_one_listing(bucket: Bucket, tmp_path: Path) -> None:
    for n in range(30):
        bucket.put(f"many/{n:03d}.jsonl", b'{"text": "a"}\n')
    source = Source(name="many", files=(f"{bucket.url}/many/*.jsonl",))
    spec = TokenizerSpec(name="t", source="x")
    dataset = Dataset(source=source, tokenizer=spec, seq_len=8, samples_per_shard=8, shuffle_seed=0)
    files = discover(dataset, Home(tmp_path))
    assert len(files) == 30 and files[7].name == "007.jsonl" and files[7].size_bytes == 14
    assert bucket.faults.count("HEAD", ".jsonl") == 0
    assert restat(files[7]) == files[7]  # asked for alone it has the same stamp
