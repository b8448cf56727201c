"""A file read in parts gives the records of the whole file, each once and in order, wherever the cuts are."""

import gzip
import hashlib
import json
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from openlm_pipeline.corpus import blocks
from openlm_pipeline.corpus.formats import format_of
from openlm_pipeline.corpus.reader import WHOLE, BadRecord, Part, RecordReader


def lines(seed: int) -> bytes:
    rng = random.Random(seed)
    made = []
    for n in range(200):
        text = f"{n} " + "".join(rng.choice("abcdé\n ") for _ in range(rng.choice((0, 3, 40, 900))))
        made.append(json.dumps({"text": text}, ensure_ascii=False).encode())
        made += [b"{broken"] * (rng.random() < 0.05) + [b"  "] * (rng.random() < 0.05)
    return b"\n".join(made)


def read(path: Path, part: Part = WHOLE) -> tuple[list[tuple[str, int]], list[BadRecord], RecordReader]:
    bad: list[BadRecord] = []
    opened = RecordReader(str(path), part=part, max_bad_fraction=1, on_bad=bad.append)
    return [(r.text, r.offset) for r in opened], bad, opened


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.zst", "frames.jsonl.zst", "a.jsonl.gz", "a.parquet"])
@pytest.mark.parametrize("seed", range(3))
def test_parts_together_are_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, seed: int) -> None:
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 64)
    path, data = tmp_path / name, lines(seed)
    if name.endswith(".parquet"):
        texts = [json.loads(line)["text"] for line in data.split(b"\n") if line.startswith(b'{"')]
        pq.write_table(pa.table({"text": [*texts, None]}), path, row_group_size=17)
    elif name.startswith("frames"):
        path.write_bytes(b"".join(zstandard.compress(data[i : i + 700]) for i in range(0, len(data), 700)))
    elif name.endswith(".zst"):
        compressor = zstandard.ZstdCompressor().compressobj()
        pieces = [compressor.compress(data[i : i + 500]) + compressor.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)
                  for i in range(0, len(data), 500)]  # fmt: skip
        path.write_bytes(b"".join(pieces) + compressor.flush())
    elif name.endswith(".gz"):
        path.write_bytes(gzip.compress(data, compresslevel=1))
    else:
        path.write_bytes(data)
    whole, whole_bad, opened = read(path)
    for count in (1, 2, 3, 7, 50, 10_000):
        records, bad, size, first_line, owners = [], [], 0, 0, 0
        for part in format_of(str(path)).cut(path.stat().st_size, count):
            some, some_bad, part_reader = read(path, part)
            records += some
            bad += [BadRecord(b.file, b.line + first_line, b.offset, b.reason) for b in some_bad]
            first_line += part_reader.lines
            size += part_reader.bytes
            owners += bool(some)
        assert records == whole
        assert bad == whole_bad and len(bad) >= 1
        assert (first_line, size) == (opened.lines, opened.bytes)
        assert owners > 1 or count == 1
    if not name.endswith(".parquet"):
        assert opened.raw_sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_what_may_be_an_array_is_one_part() -> None:
    assert format_of("a.json.zst").cut(1 << 40, 8) == [WHOLE]
    assert len(format_of("a.jsonl.zst").cut(1 << 40, 8)) == 8
    assert format_of("a.jsonl.zst").cut(1000, 8) == [WHOLE]
