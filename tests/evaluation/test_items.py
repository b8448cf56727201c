"""The per-item table is written whole, read back equal, and refused if it is something else."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from openlm_pipeline.errors import DataError, MissingInputError
from openlm_pipeline.evaluation.items import SCHEMA, concat_items, items_table, read_items, with_context, write_items

ROW = {
    "run": "demo",
    "run_version": "v1",
    "milestone": "t0250K",
    "step": 1,
    "tokens": 250_000,
    "suite": "demo",
    "suite_version": "v1",
    "task": "copa",
    "num_fewshot": 0,
    "item": 0,
    "item_hash": "a",
    "prompt_hash": "b",
    "num_choices": 2,
    "gold": 1,
    "choice_mean": 1,
    "choice_sum": 0,
    "choice_norm": 1,
    "correct": True,
    "correct_sum": False,
    "correct_norm": True,
    "nll": 12.5,
    "num_tokens": 4,
    "metric": "InContextLearningMultipleChoiceAccuracy",
}


def test_round_trip_with_metadata(tmp_path):
    table = items_table([ROW, {**ROW, "item": 1, "category": "x"}])
    write_items(tmp_path / "items.parquet", table, {"harness_version": "1", "tasks": ["ä"]})
    read, metadata = read_items(tmp_path / "items.parquet")
    assert read.equals(table)
    assert read.schema.equals(SCHEMA)
    assert metadata == {"harness_version": "1", "tasks": ["ä"]}
    assert [p.name for p in tmp_path.iterdir()] == ["items.parquet"]


def test_concatenation():
    table = items_table([ROW])
    assert concat_items([table, table]).num_rows == 2
    assert concat_items([]).schema.equals(SCHEMA)


def test_a_new_context_changes_only_its_columns():
    table = items_table([ROW])
    context = {name: ROW[name] for name in ("run", "run_version", "suite", "suite_version", "step")}
    other = with_context(table, {**context, "milestone": "t0500K", "tokens": 500_000})
    assert other.to_pylist() == [{**table.to_pylist()[0], "milestone": "t0500K", "tokens": 500_000}]
    with pytest.raises(ValueError, match="context"):
        with_context(table, {"run": "demo"})


def test_what_is_not_a_table_of_items_is_refused(tmp_path):
    with pytest.raises(MissingInputError, match="has not been scored"):
        read_items(tmp_path / "none.parquet")
    (tmp_path / "text.parquet").write_text("hello")
    with pytest.raises(DataError, match="not a readable Parquet"):
        read_items(tmp_path / "text.parquet")
    pq.write_table(pa.table({"run": ["demo"]}), tmp_path / "other.parquet")
    with pytest.raises(DataError, match="no column 'run_version'"):
        read_items(tmp_path / "other.parquet")


def test_a_table_of_the_first_release_is_read(tmp_path):
    """What it does not have is null; what an item is worth is whether it is right."""
    later = ["value", "value_kind", "choice_bytes", "exact", "cluster", "shots", "cut_tokens"]
    assert SCHEMA.names[-len(later) :] == later
    old = items_table([ROW, {**ROW, "item": 1, "correct": False}]).drop_columns(later)
    write = old.replace_schema_metadata({b"openlm": b'{"harness_version": "2"}'})
    pq.write_table(write, tmp_path / "items.parquet")
    read, metadata = read_items(tmp_path / "items.parquet")
    assert read.schema.equals(SCHEMA) and metadata == {"harness_version": "2"}
    assert read["value"].to_pylist() == [1.0, 0.0] and set(read["value_kind"].to_pylist()) == {"correct"}
    assert all(read[name].null_count == 2 for name in later[2:])
