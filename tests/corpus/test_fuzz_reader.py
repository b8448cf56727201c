"""A thousand corrupted raw files: each is read exactly as a slow reading of the same bytes says, or fails by name.

The slow reading decompresses with another library, takes lines apart one by one and parses each with `json`. Every
input comes from a seed that its name holds, so a failure can be run again alone.
"""

import faulthandler
import gzip
import io
import json
import random
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from slow_reader import BOM, MAX_RECORD_BYTES, FileFails, Reading, slow_reading

from openlm_pipeline.corpus import blocks
from openlm_pipeline.corpus.formats import format_of
from openlm_pipeline.corpus.reader import WHOLE, BadRecord, Part, RecordReader, quarantine_writer
from openlm_pipeline.errors import DataError, OpenLMError

INPUTS_PER_FORMAT = 100
SECONDS_PER_INPUT = 20.0
RECORDS = 40
WRONG = (
    b"1",
    b"null",
    b"[]",
    b'"text"',
    b"{}",
    b'{"text": 1}',
    b'{"text": null}',
    b'{"text": ["a"]}',
    b'{"Text": "a"}',
)
ODD = (
    b"\x00", b"\xff", b"\xc3", b"\xed\xa0\x80", b"\\ud800", b"\\udc00\\ud83d", BOM, b"\r", b"\n", b"\r\n", b"\n \t\n",
    b"\x0b", b'"', b"\\", b"{", b"}", b"[", b"]", b",", b"NaN", b"-Infinity", b"1e999", b"\xf4\x90\x80\x80",
    b"\xe2\x80\xa8", b"\x1b", b"9" * 400, b"9" * 5000, b'{"text": "whole"}',
)  # fmt: skip

Corruption = Callable[[random.Random, bytes], bytes]


# ---- valid files


def values(rng: random.Random) -> list[dict[str, object]]:
    words = ["plain", "naïve", "文字", "😀", 'quote " and \\', "]}[{,", "two\nlines", "\u2028", "\x00", " " * 30]
    return [
        {"id": n, "text": f"{n} " + " ".join(rng.choices(words, k=rng.choice((0, 2, 9, 60)))), "meta": {"a": [n, 1.5]}}
        for n in range(RECORDS)
    ]


def json_lines(rng: random.Random) -> bytes:
    made = [json.dumps(v, ensure_ascii=rng.random() < 0.3).encode() for v in values(rng)]
    return b"\n".join(made) + b"\n" * (rng.random() < 0.8)


def json_array(rng: random.Random) -> bytes:
    return json.dumps(values(rng), ensure_ascii=False, indent=rng.choice((None, 1))).encode()


def one_frame(rng: random.Random, content: bytes) -> bytes:
    return zstandard.ZstdCompressor(write_checksum=rng.random() < 0.5).compress(content)


def frames(rng: random.Random, content: bytes) -> bytes:
    return b"".join(one_frame(rng, content[i : i + 900]) for i in range(0, len(content), 900)) or one_frame(rng, b"")


def members(rng: random.Random, content: bytes) -> bytes:
    size = rng.choice((700, 1 << 20))
    made = (gzip.compress(content[i : i + size], mtime=0) for i in range(0, len(content), size))
    return b"".join(made) or gzip.compress(b"")


def plain(rng: random.Random, content: bytes) -> bytes:
    return content


# ---- corruptions


def cut_off(rng: random.Random, data: bytes) -> bytes:
    return data[: rng.randrange(len(data))]


def flip(rng: random.Random, data: bytes) -> bytes:
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 3, 30))):
        out[rng.randrange(len(out))] ^= 1 << rng.randrange(8)
    return bytes(out)


def stretch(rng: random.Random, data: bytes) -> tuple[int, int]:
    begin = rng.randrange(len(data))
    return begin, min(len(data), begin + rng.choice((1, 7, 100, 2000)))


def splice(rng: random.Random, data: bytes) -> bytes:
    begin, end = stretch(rng, data)
    at = rng.randrange(len(data))
    return data[:at] + data[begin:end] + data[at:]


def drop(rng: random.Random, data: bytes) -> bytes:
    begin, end = stretch(rng, data)
    return data[:begin] + data[end:]


def insert(rng: random.Random, data: bytes) -> bytes:
    at = rng.randrange(len(data) + 1)
    return data[:at] + rng.randbytes(rng.choice((1, 4, 50))) + data[at:]


def zeros(rng: random.Random, data: bytes) -> bytes:
    begin, end = stretch(rng, data)
    return data[:begin] + bytes(end - begin) + data[end:]


def odd(rng: random.Random, data: bytes) -> bytes:
    for _ in range(rng.choice((1, 2, 6))):
        at = rng.choice((0, rng.randrange(len(data) + 1), len(data)))
        data = data[:at] + rng.choice(ODD) + data[at:]
    return data


def replace_record(rng: random.Random, data: bytes, new: bytes) -> bytes:
    """Put something in the place of a line (or of an element that is a line)."""
    pieces = data.split(b"\n")
    pieces[rng.randrange(len(pieces))] = new
    return b"\n".join(pieces)


def wrong_type(rng: random.Random, data: bytes) -> bytes:
    return replace_record(rng, data, rng.choice(WRONG))


def nested(rng: random.Random, data: bytes) -> bytes:
    depth = rng.choice((10, 300, 5000, 50_000))
    opening, closing = rng.choice(((b"[", b"]"), (b'{"a":', b"}")))
    inner = opening * depth + b"1" + closing * (depth - rng.choice((0, 0, 1)))
    return replace_record(rng, data, b'{"text": "deep", "d": ' + inner + b"}")


def huge(rng: random.Random, data: bytes) -> bytes:
    size = MAX_RECORD_BYTES + rng.choice((-13, -12, -11, 1, 90_000))  # one byte below the limit, the limit, one above
    return replace_record(rng, data, b'{"text": "' + b"x" * size + rng.choice((b'"}', b"")))


def duplicate_keys(rng: random.Random, data: bytes) -> bytes:
    return data.replace(b'"id": ', rng.choice((b'"text": "first", "id": ', b'"text": 1, "id": ')), rng.choice((1, 5)))


def crlf(rng: random.Random, data: bytes) -> bytes:
    return rng.choice((b"", BOM)) + data.replace(b"\n", b"\r\n", rng.choice((1, 5, -1)))


BYTES: tuple[Corruption, ...] = (cut_off, flip, splice, drop, insert, zeros)
CONTENT: tuple[Corruption, ...] = (*BYTES, odd, wrong_type, nested, huge, duplicate_keys, crlf)


# ---- the reader itself


def read(path: Path, part: Part = WHOLE) -> tuple[Reading, RecordReader]:
    """What the reader gives, its quarantine taken from the file that it makes."""
    out = Reading()
    quarantine = path.with_suffix(".quarantine")
    with quarantine_writer(quarantine) as on_bad:
        opened = RecordReader(str(path), max_bad_fraction=1, on_bad=on_bad, part=part)
        out.good = [(r.number, r.text, r.offset) for r in opened]
    lines = [json.loads(line) for line in quarantine.read_text().splitlines()]
    quarantine.unlink()
    assert all(line["file"] == str(path) and line["reason"] for line in lines)
    out.bad = [(line["line"], line["offset"]) for line in lines]
    return out, opened


def read_in_parts(path: Path, count: int) -> Reading:
    """The same file by parts, numbers and lines made those of the whole."""
    out = Reading()
    first_number = first_line = 0
    for part in format_of(str(path)).cut(path.stat().st_size, count):
        some, opened = read(path, part)
        out.good += [(number + first_number, text, offset) for number, text, offset in some.good]
        out.bad += [(line + first_line, offset) for line, offset in some.bad]
        first_number += opened.records + opened.bad
        first_line += opened.lines
    return out


def outcome(read_it: Callable[[], Reading], path: Path) -> Reading | None:
    """None where the file fails as it should: with its name, and within the time."""
    faulthandler.dump_traceback_later(SECONDS_PER_INPUT, exit=True)
    began = time.monotonic()
    try:
        return read_it()
    except OpenLMError as e:
        assert str(path) in str(e)
        assert not path.with_suffix(".quarantine").exists()
        return None
    finally:
        faulthandler.cancel_dump_traceback_later()
        assert time.monotonic() - began < SECONDS_PER_INPUT


def parquet(rng: random.Random) -> bytes:
    texts = [v["text"].encode() for v in values(rng)]  # type: ignore[attr-defined]
    column = pa.array([None if rng.random() < 0.1 else t + b"\xff" * (rng.random() < 0.1) for t in texts], pa.binary())
    kind = rng.choice((pa.binary(), pa.large_binary(), pa.dictionary(pa.int32(), pa.binary())))
    options = {"compression": rng.choice(("none", "zstd", "snappy")), "row_group_size": rng.choice((5, 100))}
    out = io.BytesIO()
    text = column.dictionary_encode().cast(kind) if rng.random() < 0.95 else pa.array([[1]] * len(texts))
    pq.write_table(pa.table({"id": list(range(len(texts))), "text": text}), out, **options)
    return out.getvalue()


def corrupted(name: str, rng: random.Random) -> bytes:
    if name.endswith(".parquet"):
        data = parquet(rng)
        return rng.choice((plain, *BYTES))(rng, data)
    content = json_array(rng) if name.startswith("array") else json_lines(rng)
    in_content = name not in PACKED or rng.random() < 0.5
    if in_content:
        for _ in range(rng.choice((1, 1, 2))):
            content = rng.choice(CONTENT)(rng, content) if content else content
    data = PACKED.get(name, plain)(rng, content)
    return data if in_content else rng.choice(BYTES)(rng, data)


PACKED: dict[str, Callable[[random.Random, bytes], bytes]] = {
    "one_frame.jsonl.zst": one_frame,
    "frames.jsonl.zst": frames,
    "members.jsonl.gz": members,
    "array.json.zst": one_frame,
    "lines.json.gz": members,
}
FOUND = {
    "a.parquet": (478, 7319),
    "one_frame.jsonl.zst": (150, 241),
    "frames.jsonl.zst": (313,),
    "members.jsonl.gz": (375,),
}
"""More seeds, of inputs that once were read wrong."""
NAMES = ("a.jsonl", "b.jsonl", "array.json", "lines.json", "a.parquet", *PACKED)


@pytest.mark.parametrize("name", NAMES)
def test_corrupted_files_are_read_as_a_slow_reader_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    failed = read_whole = quarantined = 0
    for seed in (*range(INPUTS_PER_FORMAT), *FOUND.get(name, ())):
        rng = random.Random(f"{name} {seed}")
        block = rng.choice((64, 1000, 1 << 17))
        for constant, value in (("BLOCK_BYTES", block), ("MAX_RECORD_BYTES", MAX_RECORD_BYTES)):
            monkeypatch.setattr(blocks, constant, value)
        path = tmp_path / f"{seed}_{name}"
        path.write_bytes(data := corrupted(name, rng))
        try:
            expected = slow_reading(name, data)
        except FileFails:
            expected = None
        found = outcome(lambda path=path: read(path)[0], path)
        assert found == expected, f"seed {seed}"
        parts = rng.choice((2, 5, 20))
        in_parts = outcome(lambda path=path, parts=parts: read_in_parts(path, parts), path)
        assert in_parts == expected, f"seed {seed}, in parts"
        failed += expected is None
        read_whole += expected is not None
        quarantined += len(expected.bad) if expected else 0
    assert read_whole > INPUTS_PER_FORMAT // 10 and quarantined  # both kinds of outcome are really there
    assert failed or name.endswith("jsonl")


def test_lines_left_alone_come_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 64)
    for seed in range(INPUTS_PER_FORMAT):
        rng = random.Random(f"alone {seed}")
        content = json_lines(rng)
        broken = rng.choice(BYTES)(rng, content)
        path = tmp_path / "a.jsonl"
        path.write_bytes(broken)
        if (found := outcome(lambda path=path: read(path)[0], path)) is None:
            assert not broken.endswith(b"\n")
            continue
        alone = set(content.split(b"\n")) & set(broken.split(b"\n")) - {b""}
        assert {json.loads(line)["text"] for line in alone} <= {text for _, text, _ in found.good}, f"seed {seed}"


def test_the_default_threshold_names_file_and_first_bad_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    for seed in range(INPUTS_PER_FORMAT):
        rng = random.Random(f"threshold {seed}")
        path.write_bytes(data := wrong_type(rng, json_lines(rng)))
        bad: list[BadRecord] = []
        expected = slow_reading("a.jsonl", data)
        with pytest.raises(DataError, match=rf"{path.name}.*\. The first is line {expected.bad[0][0]}: "):
            list(RecordReader(str(path), on_bad=bad.append))
        assert [(b.line, b.offset) for b in bad] == expected.bad
