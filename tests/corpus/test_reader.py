"""Reading raw files: nothing good is lost, nothing bad passes, and errors name the place."""

import bz2
import gzip
import hashlib
import json
import lzma
import math
import tracemalloc
from collections.abc import Callable, Iterable
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from openlm_pipeline.corpus import blocks
from openlm_pipeline.corpus.formats import Part
from openlm_pipeline.corpus.reader import BadRecord, Record, RecordReader, quarantine_writer
from openlm_pipeline.errors import ConfigError, DataError, MissingInputError

TEXTS = [
    "plain",
    "", 'quotes " and \\ and ]}[{,', "two\nlines\u2028and more", "naïve 文字 😀", "\x00 control", "long " * 50_000,
]  # fmt: skip


def jsonl(texts: list[str], *, ensure_ascii: bool = False) -> bytes:
    return b"".join(json.dumps({"id": i, "text": t}, ensure_ascii=ensure_ascii).encode() + b"\n"
                    for i, t in enumerate(texts))  # fmt: skip


def zst(*frames: bytes) -> bytes:
    return b"".join(zstandard.ZstdCompressor().compress(f) for f in frames)


def read(path: Path | str, **settings: object) -> tuple[list[Record], list[BadRecord]]:
    bad: list[BadRecord] = []
    return list(RecordReader(str(path), on_bad=bad.append, **settings)), bad  # type: ignore[arg-type]


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def array(texts: list[str], indent: int | None) -> bytes:
    return json.dumps([{"id": i, "text": t} for i, t in enumerate(texts)], indent=indent, ensure_ascii=False).encode()


def parquet(texts: list[str], path: Path, kind: pa.DataType) -> bytes:
    column = pa.array(texts, kind) if not pa.types.is_dictionary(kind) else pa.array(texts).dictionary_encode()
    pq.write_table(pa.table({"id": list(range(len(texts))), "text": column}), path, row_group_size=3)
    return path.read_bytes()


ENCODERS = {
    "a.jsonl": lambda p: jsonl(TEXTS),
    "ascii.jsonl": lambda p: jsonl(TEXTS, ensure_ascii=True),
    "no_last_newline.jsonl": lambda p: jsonl(TEXTS).rstrip(b"\n"),
    "crlf_and_blank_lines.jsonl": lambda p: b"\xef\xbb\xbf\n" + jsonl(TEXTS).replace(b"\n", b"\r\n \r\n"),
    "a.jsonl.zst": lambda p: zst(jsonl(TEXTS)),
    "frames.zst": lambda p: zst(jsonl(TEXTS)[:100_000], b"", jsonl(TEXTS)[100_000:]),
    "skippable.zst": lambda p: b"\x50\x2a\x4d\x18\x04\x00\x00\x00abcd" + zst(jsonl(TEXTS)),
    "a.jsonl.gz": lambda p: gzip.compress(jsonl(TEXTS)),
    "members.gz": lambda p: gzip.compress(jsonl(TEXTS)[:99]) + gzip.compress(jsonl(TEXTS)[99:]) + b"\0" * 9,
    "lines.json": lambda p: jsonl(TEXTS),
    "array.json": lambda p: array(TEXTS, None),
    "indented.json": lambda p: b" \n" + array(TEXTS, 2) + b"\n",
    "array.json.gz": lambda p: gzip.compress(array(TEXTS, 1)),
    "a.parquet": lambda p: parquet(TEXTS, p, pa.string()),
    "dictionary.parquet": lambda p: parquet(TEXTS, p, pa.dictionary(pa.int32(), pa.string())),
}


@pytest.mark.parametrize("name", ENCODERS)
def test_every_format_reads_the_same(tmp_path: Path, name: str) -> None:
    records, bad = read(write(tmp_path / name, ENCODERS[name](tmp_path / name)))
    assert [r.text for r in records] == TEXTS
    assert [r.number for r in records] == list(range(len(TEXTS)))
    assert bad == []


@pytest.mark.parametrize("block", [1, 7, 64])
@pytest.mark.parametrize("name", ["a.jsonl", "crlf_and_blank_lines.jsonl", "indented.json", "array.json"])
def test_where_blocks_end_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, block: int
) -> None:
    texts = TEXTS[:-1]
    monkeypatch.setitem(globals(), "TEXTS", texts)
    data = ENCODERS[name](tmp_path / name)
    monkeypatch.setattr("openlm_pipeline.corpus.blocks.BLOCK_BYTES", block)
    records, bad = read(write(tmp_path / name, data))
    assert [r.text for r in records] == texts and bad == []
    for record in records:
        start = data.index(b"{", record.offset)
        assert data[record.offset : start].strip() in (b"", b"\xef\xbb\xbf")
        assert json.JSONDecoder().raw_decode(data[start:].decode())[0]["text"] == record.text


def test_urls_of_other_file_systems(tmp_path: Path) -> None:
    with fsspec.open("memory://reader/x.jsonl.zst", "wb") as f:
        f.write(zst(jsonl(TEXTS)))
    assert [r.text for r in read("memory://reader/x.jsonl.zst")[0]] == TEXTS


BAD_LINES = {
    b'{"text": "cut': "not valid JSON: ",
    b'{"text": "a"} {"text": "b"}': "not valid JSON: ",
    b'{"text": NaN}': "field 'text' is a null, not a string",
    b'["text"]': "not a JSON object but a list",
    b'"text"': "not a JSON object but a string",
    b'{"body": "x"}': "no field 'text'",
    b'{"text": 3}': "field 'text' is a number, not a string",
    b'{"text": null}': "field 'text' is a null, not a string",
    b'{"text": ["x"]}': "field 'text' is a list, not a string",
    b'{"text": "\xff\xfe"}': "invalid UTF-8 at byte 10",
    b'{"text": "\\ud800"}': "not valid JSON: ",
    b"[" * 200_000: "not valid JSON: ",
    b'{"text": ' + b'{"a":' * 100_000 + b"1" + b"}" * 100_000 + b"}": "not valid JSON: ",
}


@pytest.mark.parametrize("line", BAD_LINES, ids=lambda line: line[:24].decode("latin1"))
@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.zst", ".json"])
def test_a_bad_line_is_named_and_no_good_one_is_lost(tmp_path: Path, line: bytes, suffix: str) -> None:
    lines = [b'{"text": "first"}', b"", line, b'{"text": "last"}']
    data = b"\n".join(lines)
    path = write(tmp_path / f"x{suffix}", zst(data) if suffix.endswith("zst") else data)
    records, bad = read(path, max_bad_fraction=0.5)
    assert [(r.number, r.text) for r in records] == [(0, "first"), (2, "last")]
    assert [(b.file, b.line, b.offset) for b in bad] == [(str(path), 3, len(lines[0]) + 2)]
    assert bad[0].reason.startswith(BAD_LINES[line])
    assert data[records[1].offset :] == lines[3]


@pytest.mark.parametrize("line", [k for k in BAD_LINES if k.count(b"[") < 2 and k.count(b'"') % 2 == 0][1:],
                         ids=lambda line: line[:24].decode("latin1"))  # fmt: skip
def test_a_bad_array_element_is_named_and_no_good_one_is_lost(tmp_path: Path, line: bytes) -> None:
    data = b'[{"text": "first"},\n' + line + b',\n{"text": "last"}]'
    path = write(tmp_path / "x.json", data)
    records, bad = read(path, max_bad_fraction=0.5)
    assert [(r.number, r.text) for r in records] == [(0, "first"), (2, "last")]
    assert [(b.line, b.offset) for b in bad] == [(2, data.index(b"\n") + 1)]
    assert bad[0].reason.startswith(BAD_LINES[line])


def test_bad_parquet_rows_are_named(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    binary = pa.array([b"first", None, b"\xff", b"last"], pa.binary())
    text = pa.StringArray.from_buffers(4, binary.buffers()[1], binary.buffers()[2], binary.buffers()[0], 1)
    pq.write_table(pa.table({"text": text}), path)
    records, bad = read(path, max_bad_fraction=0.5)
    assert [(r.number, r.text) for r in records] == [(0, "first"), (3, "last")]
    assert [(b.line, b.reason) for b in bad] == [
        (2, "field 'text' is a null, not a string"),
        (3, "invalid UTF-8 at byte 0 of the record"),
    ]


@pytest.mark.parametrize("column", ["id", "body"])
def test_a_parquet_column_that_is_no_text_is_an_error(tmp_path: Path, column: str) -> None:
    parquet(["x"], tmp_path / "x.parquet", pa.string())
    with pytest.raises(DataError, match=rf"{column}.*text_key"):
        read(tmp_path / "x.parquet", text_key=column)


def test_an_endless_line_is_bad_and_the_next_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "MAX_RECORD_BYTES", 3 << 20)
    path = write(tmp_path / "x.jsonl", jsonl(["a"]) + b'{"text": "' + b"x" * (5 << 20) + b'"}\n' + jsonl(["b"]))
    records, bad = read(path, max_bad_fraction=0.5)
    assert [(r.number, r.text) for r in records] == [(0, "a"), (2, "b")]
    assert [(b.line, b.reason) for b in bad] == [(2, "longer than 3 MiB")]
    assert path.read_bytes()[records[1].offset :] == jsonl(["b"])


def test_the_threshold_is_exact_and_names_file_counts_and_first_line(tmp_path: Path) -> None:
    good, broken = jsonl(["x"] * 8), b"{}\n"
    path = write(tmp_path / "x.jsonl", good + broken * 2)
    reading = RecordReader(str(path), max_bad_fraction=0.2, on_bad=lambda bad: None)
    assert len(list(reading)) == 8
    assert (reading.records, reading.bad, reading.bytes) == (8, 2, path.stat().st_size)
    with pytest.raises(DataError, match=r"x\.jsonl: 2 of 10 records.*line 9: no field 'text'"):
        read(path, max_bad_fraction=0.19)


def test_a_hopeless_file_stops_early(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", b"{}\n" * 50_000)
    bad: list[BadRecord] = []
    with pytest.raises(DataError, match="1001 of 1001"):
        list(RecordReader(str(path), on_bad=bad.append))
    assert len(bad) == 1001


def incompressible(count: int) -> list[str]:
    import random

    source = random.Random(0)
    return [source.randbytes(400).hex() for _ in range(count)]


@pytest.mark.parametrize("suffix", [".jsonl.zst", ".jsonl.gz"])
@pytest.mark.parametrize("share", [0.0001, 0.01, 0.3, 0.77, 0.999, 0.99999])
def test_a_truncated_archive_fails_and_tells_where(tmp_path: Path, suffix: str, share: float) -> None:
    content = jsonl(incompressible(400))
    whole = zst(content[:200_000], content[200_000:]) if suffix.endswith("zst") else gzip.compress(content)
    cut = max(1, min(int(len(whole) * share), len(whole) - 1))
    path = write(tmp_path / f"x{suffix}", whole[:cut])
    with pytest.raises(DataError, match=rf"x{suffix} is truncated: .* compressed byte {cut}\."):
        read(path)


@pytest.mark.parametrize("name", ["x.json", "x.parquet"])
def test_a_truncated_array_or_parquet_file_fails(tmp_path: Path, name: str) -> None:
    whole = ENCODERS["array.json" if name.endswith("json") else "a.parquet"](tmp_path / name)
    for cut in (5, len(whole) // 2, len(whole) - 1):
        with pytest.raises(DataError, match=name):
            read(write(tmp_path / name, whole[:cut]))


def test_text_after_an_array_fails(tmp_path: Path) -> None:
    for tail in (b"{}", b"x", b'"x"', b"]"):
        with pytest.raises(DataError, match="continues after its top-level array, at byte 15"):
            read(write(tmp_path / "x.json", b'[{"text": "a"}]' + tail))


@pytest.mark.parametrize("suffix", [".jsonl.zst", ".jsonl.gz"])
def test_flipped_bytes_fail(tmp_path: Path, suffix: str) -> None:
    content = jsonl(incompressible(100))
    compressor = zstandard.ZstdCompressor(write_checksum=True)
    data = bytearray(compressor.compress(content) if suffix.endswith("zst") else gzip.compress(content))
    for at in (0, len(data) // 2):
        broken = bytearray(data)
        broken[at] ^= 0x40
        with pytest.raises(DataError, match=r"corrupt near compressed byte \d+"):
            read(write(tmp_path / f"x{suffix}", bytes(broken)))


@pytest.mark.parametrize("suffix", [".jsonl.zst", ".jsonl.gz", ".jsonl.bz2", ".jsonl.xz", ".parquet"])
def test_a_file_of_no_bytes_that_could_not_be_so_fails(tmp_path: Path, suffix: str) -> None:
    with pytest.raises(DataError, match=rf"x{suffix} is empty"):
        read(write(tmp_path / f"x{suffix}", b""))


def test_a_valid_file_that_is_empty_holds_no_records(tmp_path: Path) -> None:
    for name, data in {
        "x.jsonl": b"",
        "x.json": b"",
        "array.json": b"[]",
        "x.jsonl.zst": zst(b""),
        "x.jsonl.gz": gzip.compress(b""),
        "x.jsonl.bz2": bz2.compress(b""),
        "x.jsonl.xz": lzma.compress(b""),
    }.items():
        assert read(write(tmp_path / name, data)) == ([], [])


def test_absent_files_and_unknown_formats_are_named(tmp_path: Path) -> None:
    with pytest.raises(MissingInputError, match="x.jsonl does not exist"):
        read(tmp_path / "x.jsonl")
    with pytest.raises(ConfigError, match=r"x.csv.*\.parquet"):
        read(tmp_path / "x.csv")
    with pytest.raises(ConfigError, match="nosuch"):
        read("nosuch://bucket/x.jsonl")


def test_the_quarantine_file_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", b'{"text": "a"}\n{}\n')
    quarantined = tmp_path / "q" / "quarantine.jsonl"
    with quarantine_writer(quarantined) as quarantine:
        assert len(list(RecordReader(str(path), max_bad_fraction=1, on_bad=quarantine))) == 1
        assert not quarantined.exists()
    assert [json.loads(line) for line in quarantined.read_text().splitlines()] == [
        {"file": str(path), "line": 2, "offset": 14, "reason": "no field 'text'"}
    ]
    with pytest.raises(DataError), quarantine_writer(tmp_path / "never.jsonl") as quarantine:
        list(RecordReader(str(path), max_bad_fraction=0, on_bad=quarantine))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["q", "x.jsonl"]


def test_real_text_reads_whole(shared_data: Path) -> None:
    path = shared_data / "raw" / "00.jsonl.zst"
    with zstandard.open(path, "rb") as f:
        expected = f.read().count(b"\n")
    records, bad = read(path)
    assert (len(records), bad) == (expected, [])


RENAMED = ["x.jsonl", "x.jsonl.zst", "x.jsonl.gz", "x.ndjson.bz2", "X.JSONL.XZ", "x.jsonl.zstd", "x.xz"]


@pytest.mark.parametrize("name", RENAMED)
@pytest.mark.parametrize("pack", [bytes, zst, gzip.compress, bz2.compress, lzma.compress], ids=lambda p: p.__name__)
def test_a_file_is_what_it_is_whatever_its_name_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, pack: Callable[[bytes], bytes]
) -> None:
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 64)
    path = write(tmp_path / name, pack(jsonl(TEXTS)))
    records, bad = read(path)
    assert [r.text for r in records] == TEXTS and not bad
    parts = [Part(0, 64), Part(64, 128), Part(128, None)]
    opened = [RecordReader(str(path), on_bad=bad.append, part=part) for part in parts]
    assert [r.text for reader in opened for r in reader] == TEXTS
    assert opened[-1].raw_sha256 == (None if pack is bytes else hashlib.sha256(path.read_bytes()).hexdigest())


def test_several_streams_are_one_content_and_a_cut_is_named(tmp_path: Path) -> None:
    for suffix, pack in {"zst": zst, "bz2": bz2.compress, "xz": lzma.compress, "gz": gzip.compress}.items():
        data = pack(jsonl(TEXTS[:2])) + pack(b"") + pack(jsonl(TEXTS[2:]))
        path = write(tmp_path / f"x.jsonl.{suffix}", data)
        assert [r.text for r in read(path)[0]] == TEXTS
        with pytest.raises(DataError, match=r"is truncated: it ends inside a \w+ \w+ at compressed byte"):
            read(write(path, data[:-3]))
        broken = bytearray(data)
        broken[len(data) // 3] ^= 0x40
        with pytest.raises(DataError, match="compressed byte|truncated|records are bad"):
            read(write(path, bytes(broken)), max_bad_fraction=0)


def test_a_few_bytes_that_stand_for_gigabytes_take_little_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("openlm_pipeline.corpus.blocks.MAX_RECORD_BYTES", 1 << 20)
    content = b'{"text": "' + b"a" * (40 << 20) + b'"}\n{"text": "short"}\n'
    for suffix, pack in {"zst": zst, "bz2": bz2.compress, "xz": lzma.compress, "gz": gzip.compress}.items():
        path = write(tmp_path / f"x.jsonl.{suffix}", pack(content))
        assert path.stat().st_size < 300_000
        tracemalloc.start()
        records, bad = read(path, max_bad_fraction=1)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert [r.text for r in records] == ["short"] and "longer than 1 MiB" in bad[0].reason
        assert peak < 16 << 20


def test_a_large_window_of_zstd_is_filled_only_by_a_large_file(tmp_path: Path) -> None:
    """Its window, of 2 GiB, holds all that a frame gives."""
    import psutil

    wide = zstandard.ZstdCompressionParameters.from_level(1, window_log=31)

    def packed(name: str, contents: Iterable[bytes]) -> Path:
        frame = zstandard.ZstdCompressor(compression_params=wide).compressobj()
        return write(tmp_path / name, b"".join([*map(frame.compress, contents), frame.flush()]))

    small = packed("small.jsonl.zst", [b'{"text": "a"}\n'] * 3)
    assert [r.text for r in read(small)[0]] == ["a"] * 3
    large = packed("large.jsonl.zst", [b'{"text": "' + b"x" * (1 << 20) + b'"}\n'] * 400)
    assert large.stat().st_size < 100_000
    before = psutil.Process().memory_info().rss
    with pytest.raises(DataError, match="is corrupt near .*its large window is filled with 1,000 times"):
        for _ in RecordReader(str(large), on_bad=print):
            assert psutil.Process().memory_info().rss - before < 400 << 20


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
def test_a_file_that_ends_inside_a_record_fails(tmp_path: Path, suffix: str) -> None:
    pack = gzip.compress if suffix.endswith("gz") else bytes
    whole = jsonl(["a text"] * 3000)
    for end in (b'{"text": "cut', b"\0" * 100, b'{"text": "\xc3'):
        with pytest.raises(DataError, match=rf"ends inside line 3001, which begins at byte {len(whole)}"):
            read(write(tmp_path / f"x{suffix}", pack(whole + end)))
    records, bad = read(write(tmp_path / f"x{suffix}", pack(whole + b'{"text": "no line break"}')))
    assert records[-1].text == "no line break" and not bad


def test_bytes_in_bad_records_count(tmp_path: Path) -> None:
    few_large = jsonl(["a" * 100] * 3000) + b'{"text": ' + b"x" * 200_000 + b"}\n"
    with pytest.raises(DataError, match=r"20001\d of \d+ bytes are in bad records \(\d+\.\d+%, more than 10 times"):
        read(write(tmp_path / "x.jsonl", few_large))
    _, bad = read(write(tmp_path / "x.jsonl", jsonl(["a" * 100] * 3000) + b'{"text": ' + b"x" * 500 + b"}\n"))
    assert len(bad) == 1


def test_what_pythons_json_writes_for_floats_is_read(tmp_path: Path) -> None:
    lines = [json.dumps({"meta": [math.nan, {"a": math.inf}], "text": f"NaN {n}", "b": -math.inf}) for n in range(5)]
    records, bad = read(write(tmp_path / "x.jsonl", "\n".join(lines).encode()))
    assert [r.text for r in records] == [f"NaN {n}" for n in range(5)] and not bad


def test_a_text_inside_other_fields(tmp_path: Path) -> None:
    rows = [{"meta": {"text": t, "n": 1}, "a.b": t} for t in TEXTS]
    path = write(tmp_path / "x.jsonl", b"".join(json.dumps(row).encode() + b"\n" for row in rows))
    for key in ("meta.text", "a.b"):
        assert [r.text for r in read(path, text_key=key)[0]] == TEXTS
    assert read(path, text_key="meta.body", max_bad_fraction=1)[1][0].reason == "no field 'meta.body'"
    parquet = tmp_path / "x.parquet"
    pq.write_table(pa.Table.from_pylist(rows), parquet)
    for key in ("meta.text", "a.b"):
        assert [r.text for r in read(parquet, text_key=key)[0]] == TEXTS
    with pytest.raises(DataError, match=r"has no column 'meta\.body' but (n, text|text, n)"):
        read(parquet, text_key="meta.body")


def test_parquet_texts_that_are_stored_as_differences_are_read(tmp_path):
    texts = [f"a long beginning that all of them have, number {n}" for n in range(3000)]
    path = tmp_path / "x.parquet"
    how = {"column_encoding": {"text": "DELTA_BYTE_ARRAY"}, "use_dictionary": False, "row_group_size": 1000}
    pq.write_table(pa.table({"text": texts}), path, **how)
    assert [record.text for record in RecordReader(str(path), on_bad=print)] == texts
