"""Inputs met in the field or made up in malice, through the command: read whole, or refused by name; never less."""

import bz2
import gzip
import io
import json
import lzma
from dataclasses import dataclass, field
from pathlib import Path

import commands
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

TEXTS = [f"document {n} of some words" for n in range(40)]
LINES = [json.dumps({"text": text}) for text in TEXTS]
WHOLE = "\n".join([*LINES, ""]).encode()
HALF = "\n".join([*LINES[:20], ""]).encode()
SIZE = len(WHOLE)


def zst(data: bytes, **options: object) -> bytes:
    return zstandard.ZstdCompressor(**options).compress(data)


def parquet(table: pa.Table, **options: object) -> bytes:
    out = io.BytesIO()
    pq.write_table(table, out, **options)
    return out.getvalue()


def rows(**columns: object) -> bytes:
    return parquet(pa.table(columns))


def flipped(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 0x10]) + data[at + 1 :]


@dataclass(frozen=True)
class Case:
    """Files and options, and what should come of them."""

    files: dict[str, bytes]
    documents: int | None = None
    """In the shards; None where the command is to fail."""
    says: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    code: int = 4
    inputs: tuple[str, ...] = field(default=("in/*",))


SKIPPABLE = b"\x50\x2a\x4d\x18\x04\x00\x00\x00skip"
CASES = {
    # read whole
    "several frames": Case({"x.jsonl.zst": zst(HALF) + zst(WHOLE[len(HALF) :])}, 40),
    "a skippable frame before and after": Case({"x.jsonl.zst": SKIPPABLE + zst(WHOLE) + SKIPPABLE}, 40),
    "a frame of nothing in between": Case({"x.jsonl.zst": zst(HALF) + zst(b"") + zst(WHOLE[len(HALF) :])}, 40),
    "a long window": Case(
        {"x.jsonl.zst": zst(WHOLE, compression_params=zstandard.ZstdCompressionParameters(window_log=27))}, 40
    ),
    "zeros after a gzip member": Case({"x.jsonl.gz": gzip.compress(WHOLE) + bytes(512)}, 40),
    "gzip called zst": Case({"x.jsonl.zst": gzip.compress(WHOLE)}, 40),
    "plain called gz": Case({"x.jsonl.gz": WHOLE}, 40),
    "zst called jsonl": Case({"x.jsonl": zst(WHOLE)}, 40),
    "xz with padding between streams": Case(
        {"x.jsonl.xz": lzma.compress(HALF) + bytes(8) + lzma.compress(WHOLE[len(HALF) :])}, 40
    ),
    "bz2 of two streams": Case({"x.jsonl.bz2": bz2.compress(HALF) + bz2.compress(WHOLE[len(HALF) :])}, 40),
    "a byte order mark and CRLF": Case({"x.jsonl": b"\xef\xbb\xbf" + WHOLE.replace(b"\n", b"\r\n")}, 40),
    "no line break at the end": Case({"x.jsonl": WHOLE[:-1]}, 40),
    "blank lines": Case({"x.jsonl": WHOLE.replace(b"\n", b"\n \n\n")}, 40),
    "an indented array": Case({"x.json": json.dumps([{"text": t} for t in TEXTS], indent=4).encode()}, 40),
    "an array in one line called jsonl-ish json": Case(
        {"x.json": json.dumps([{"text": t} for t in TEXTS]).encode()}, 40
    ),
    "an empty file beside a full one": Case({"a.jsonl": b"", "x.jsonl": WHOLE}, 40),
    "an empty array beside a full file": Case({"a.json": b"[]", "x.jsonl": WHOLE}, 40),
    "Parquet of large strings": Case({"x.parquet": rows(text=pa.array(TEXTS, pa.large_string()))}, 40),
    "Parquet of a dictionary": Case({"x.parquet": rows(text=pa.array(TEXTS).dictionary_encode())}, 40),
    "Parquet without rows beside one with": Case(
        {"a.parquet": rows(text=pa.array([], pa.string())), "x.parquet": rows(text=TEXTS)}, 40
    ),
    "Parquet of many row groups": Case({"x.parquet": parquet(pa.table({"text": TEXTS}), row_group_size=3)}, 40),
    "a name with spaces, commas and quotes": Case({"a b, 'c' [1] {2}.jsonl": WHOLE}, 40),
    "a name that is not ASCII": Case({"文字 é.jsonl": WHOLE}, 40),
    "empty texts": Case({"x.jsonl": b'{"text": ""}\n' * 500 + WHOLE}, 540),
    "two keys of one name": Case({"x.jsonl": WHOLE.replace(b'{"text"', b'{"text": 1, "text"')}, 40),
    "numbers out of range in other fields": Case(
        {"x.jsonl": WHOLE.replace(b'{"text"', b'{"n": 1e400, "m": NaN, "text"')}, None, ("bad",)
    ),
    "infinity in other fields": Case({"x.jsonl": WHOLE.replace(b'{"text"', b'{"n": -Infinity, "text"')}, 40),
    # refused by name
    "cut inside a frame": Case({"x.jsonl.zst": zst(WHOLE)[:-4]}, None, ("x.jsonl.zst is truncated",)),
    "cut inside the second frame": Case(
        {"x.jsonl.zst": zst(HALF) + zst(WHOLE)[:40]}, None, ("x.jsonl.zst is truncated",)
    ),
    "cut gzip": Case({"x.jsonl.gz": gzip.compress(WHOLE)[:-9]}, None, ("x.jsonl.gz is truncated",)),
    "cut xz": Case({"x.jsonl.xz": lzma.compress(WHOLE)[:-20]}, None, ("x.jsonl.xz is truncated",)),
    "cut bz2": Case({"x.jsonl.bz2": bz2.compress(WHOLE)[:-20]}, None, ("x.jsonl.bz2 is truncated",)),
    "a flipped bit in gzip": Case({"x.jsonl.gz": flipped(gzip.compress(WHOLE), 40)}, None, ("x.jsonl.gz is corrupt",)),
    "a flipped bit under zstd's checksum": Case(
        {"x.jsonl.zst": flipped(zst(WHOLE, write_checksum=True), 60)}, None, ("x.jsonl.zst is corrupt",)
    ),
    "text after a frame": Case({"x.jsonl.zst": zst(WHOLE) + b"more"}, None, ("x.jsonl.zst is corrupt",)),
    "HTML in place of data": Case(
        {"x.jsonl": b"<html>403 Forbidden</html>\n" * 3}, None, ("x.jsonl", "not valid JSON")
    ),
    "HTML called zst": Case({"x.jsonl.zst": b"<html>403</html>"}, None, ("x.jsonl.zst is corrupt",)),
    "a pointer of Git LFS": Case(
        {"x.jsonl": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"}, None, ("not valid JSON",)
    ),
    "half a record": Case({"x.jsonl": WHOLE[:-9]}, None, ("truncated", "line 40")),
    "a third of zeros": Case({"x.jsonl": WHOLE + bytes(SIZE // 2)}, None, ("truncated", f"byte {SIZE}")),
    "zeros and a line break": Case(
        {"x.jsonl": WHOLE * 100 + bytes(SIZE * 50) + b"\n"}, None, ("bytes are in bad records",)
    ),
    "UTF-16": Case({"x.jsonl": WHOLE.decode().encode("utf-16")}, None, ("x.jsonl",)),
    "an array that does not end": Case({"x.json": b'[{"text": "a"}, '}, None, ("x.json is truncated",)),
    "two arrays": Case({"x.json": b'[{"text": "a"}] [{"text": "b"}]'}, None, ("continues after its top-level array",)),
    "the text in another field": Case({"x.jsonl": WHOLE.replace(b"text", b"body")}, None, ("no field 'text'",)),
    "Parquet without the column": Case({"x.parquet": rows(body=TEXTS)}, None, ("no column 'text' but body",)),
    "Parquet of numbers": Case({"x.parquet": rows(text=[1, 2])}, None, ("is int64, not a string",)),
    "Parquet without its end": Case(
        {"x.parquet": rows(text=TEXTS)[:-8]}, None, ("x.parquet is not a whole Parquet file",)
    ),
    "JSON called Parquet": Case({"x.parquet": WHOLE}, None, ("x.parquet is not a whole Parquet file",)),
    "Parquet called JSON": Case({"x.jsonl": rows(text=TEXTS)}, None, ("x.jsonl",)),
    "no bytes called zst": Case({"x.jsonl.zst": b""}, None, ("x.jsonl.zst is empty",)),
    "no bytes called Parquet": Case({"x.parquet": b""}, None, ("x.parquet is empty",)),
    "nothing but empty files": Case({"x.jsonl": b""}, None, ("fewer than one sample",)),
    "a suffix of no format": Case({"x.csv": WHOLE}, None, ("x.csv has no suffix that can be read", "--format"), code=2),
    "a format that there is not": Case({"x": WHOLE}, None, ("no format 'yaml'",), ("--format", "yaml"), 2),
    "a pattern without a match": Case({"x.jsonl": WHOLE}, None, ("in/y*",), code=3, inputs=("in/*", "in/y*")),
    "an end-of-text that the tokenizer has not": Case(
        {"x.jsonl": WHOLE}, None, ("'</s>'", "--eot"), ("--eot", "</s>"), 2
    ),
    "an engine that there is not": Case(
        {"x.jsonl": WHOLE}, None, ("there is no engine 'fastest'",), ("--engine", "fastest"), 2
    ),
    # left out, counted
    "one bad of two, left out": Case(
        {"a.jsonl.zst": zst(WHOLE)[:-4], "x.jsonl": WHOLE}, 40, ("1 files and 1 left out",), ("--on-bad-file", "skip")
    ),
    "bad records that are allowed": Case(
        {"x.jsonl": WHOLE + b"no JSON\n" * 3}, 40, ("3 quarantined (3 not valid JSON)",), ("--max-bad-fraction", "0.1")
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_it_is_read_whole_or_refused_by_name(name: str, tmp_path: Path, small_bpe: Path) -> None:
    case = CASES[name]
    for file, content in case.files.items():
        (tmp_path / "in").mkdir(exist_ok=True)
        (tmp_path / "in" / file).write_bytes(content)
    inputs = [argument for pattern in case.inputs for argument in ("--input-files", tmp_path / pattern)]
    options = ["--tokenizer", small_bpe, "--seqlen", 8, "--workers", 1, *case.options]
    ended = commands.openlm("tokenize", *inputs, "--output-dir", tmp_path / "out", *options, variables={})
    said = ended.stdout + ended.stderr
    assert "Traceback" not in said
    for part in case.says:
        assert part in said
    if case.documents is None:
        assert ended.returncode == case.code, said
        assert not (tmp_path / "out" / "8-v1" / "manifest.jsonl").exists()
    else:
        assert ended.returncode == 0, said
        info = json.loads((tmp_path / "out" / "8-v1" / "dataset.json").read_text())
        assert info["totals"]["documents"] == case.documents
