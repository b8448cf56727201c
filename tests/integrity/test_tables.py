"""A table that was written with a document is read as it was, or not at all, whichever bit flips."""

import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from openlm_pipeline.errors import DataError, MissingInputError
from openlm_pipeline.storage.tables import read_table, write_table

DOCUMENT = {"of": "shard 7", "tokens": 12_345}


@pytest.fixture
def table() -> pa.Table:
    rng = random.Random(5)
    rows = [
        {
            "hash": rng.randbytes(20).hex(),
            "loss": rng.random(),
            "choices": [rng.random(), rng.random()],
            "gold": i or None,
        }
        for i in range(100)
    ]
    return pa.Table.from_pylist(rows)


def test_it_is_read_as_it_was_written(table: pa.Table, tmp_path: Path):
    path = tmp_path / "a=1" / "t.parquet"
    write_table(path, table, DOCUMENT)
    assert read_table(path) == (table, DOCUMENT)
    with pytest.raises(MissingInputError, match="does not exist"):
        read_table(tmp_path / "none.parquet")


def test_a_table_from_before_the_seal_is_read(table: pa.Table, tmp_path: Path):
    path = tmp_path / "t.parquet"
    pq.write_table(table.replace_schema_metadata({"openlm": '{"a": 1}'}), path)
    assert read_table(path) == (table, {"a": 1})


def test_a_flipped_bit_is_seen_wherever_it_is(table: pa.Table, tmp_path: Path):
    path = tmp_path / "t.parquet"
    write_table(path, table, DOCUMENT)
    content, rng = path.read_bytes(), random.Random(11)
    refused, silent = 0, []
    for at in range(0, len(content), 3):
        flipped = bytearray(content)
        flipped[at] ^= 1 << rng.randrange(8)
        path.write_bytes(flipped)
        try:
            read, document = read_table(path)
        except DataError:
            refused += 1
            continue
        if not read.equals(table) or document != DOCUMENT:
            silent.append(at)
    assert silent == [] and refused > len(content) / 9
