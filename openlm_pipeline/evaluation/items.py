"""The per-item table: one row per question, in Parquet. It is the source of truth; every summary derives from it.

Its schema is `SCHEMA`; a file's metadata holds the JSON document given to `write_items`. Files appear whole or not
at all.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from openlm_pipeline.errors import DataError, MissingInputError
from openlm_pipeline.storage.tables import read_table, write_table


def column(name: str, kind: pa.DataType, about: str, *, nullable: bool = True) -> pa.Field:
    """A column that says in the file itself what it holds."""
    return pa.field(name, kind, nullable, {"description": about})


SCHEMA = pa.schema(
    [
        column("run", pa.string(), "Name of the run, or of the model.", nullable=False),
        column("run_version", pa.string(), "Version of the run."),
        column("milestone", pa.string(), "Its label; null, as the next two, where the model is none."),
        column("step", pa.int64(), "Optimizer step of the milestone."),
        column("tokens", pa.int64(), "Trained on at this milestone."),
        column("suite", pa.string(), "Name of the suite.", nullable=False),
        column("suite_version", pa.string(), "Version of the suite.", nullable=False),
        column("task", pa.string(), "Label of the task.", nullable=False),
        column("num_fewshot", pa.int32(), "Solved rows that the suite asks for.", nullable=False),
        column("category", pa.string(), "Part of the task, where it has such."),
        column("item", pa.int64(), "Row of the task's file, from 0.", nullable=False),
        column("item_hash", pa.string(), "Hash of the row's texts.", nullable=False),
        column("prompt_hash", pa.string(), "Hash of the prompt's token ids.", nullable=False),
        column("num_choices", pa.int32(), "Options; 1 where there is nothing to choose from.", nullable=False),
        column("gold", pa.int32(), "Number of the right option, from 0.", nullable=False),
        column("choice_logprobs", pa.list_(pa.float64()), "Of each option's continuation, nats; null in generation."),
        column("choice_tokens", pa.list_(pa.int32()), "Tokens of each option's continuation."),
        column("choice_mean", pa.int32(), "Option picked by the mean per token; null without a choice."),
        column("choice_sum", pa.int32(), "Option picked by the total."),
        column("choice_norm", pa.int32(), "Option picked by the total per character."),
        column("correct", pa.bool_(), "Right by the task's own rule; null where nothing is right or wrong."),
        column("correct_sum", pa.bool_(), "Right by the total log-probability."),
        column("correct_norm", pa.bool_(), "Right by log-probability per character."),
        column("nll", pa.float64(), "Of the right continuation, nats, summed over its tokens; null in generation."),
        column("num_tokens", pa.int32(), "Of the right continuation, or generated.", nullable=False),
        column("generated", pa.string(), "What the model wrote, in generation only."),
        column("metric", pa.string(), "The task's metric.", nullable=False),
        column("value", pa.float64(), "What the metric says of the item, as `value_kind` says."),
        column("value_kind", pa.string(), "`correct`: 1 or 0; `bits_per_byte`: of its text."),
        column("choice_bytes", pa.list_(pa.int32()), "UTF-8 bytes of each option's continuation, as in the row."),
        column("exact", pa.bool_(), "A written text is an answer, not only begins with one; in generation only."),
        column("cluster", pa.string(), "The same for items that go together; null is its item_hash."),
        column("shots", pa.int32(), "Solved rows before the question."),
        column("cut_tokens", pa.int32(), "Of its longest context, that the model's length left no room for."),
    ]
)
_OF_FIRST_RELEASE = SCHEMA.names[: SCHEMA.names.index("value")]
"""A table without the others is read: they are null there, and `value` is `correct`."""
CONTEXT_COLUMNS = ("run", "run_version", "milestone", "step", "tokens", "suite", "suite_version")
"""Columns that say what was scored; the same in every row of a scorecard's table."""


def items_table(rows: Sequence[Mapping[str, Any]]) -> pa.Table:
    """A table of `SCHEMA` from one mapping per row."""
    return pa.Table.from_pylist(list(rows), schema=SCHEMA)


def with_context(table: pa.Table, context: Mapping[str, Any]) -> pa.Table:
    """The table with its `CONTEXT_COLUMNS` set to `context`, in every row.

    Raises:
        ValueError: `context` does not have exactly those columns.
    """
    if set(context) != set(CONTEXT_COLUMNS):
        raise ValueError(f"the context has {sorted(context)}, not {sorted(CONTEXT_COLUMNS)}")
    for name, value in context.items():
        field = SCHEMA.field(name)
        column = pa.array([value] * table.num_rows, type=field.type)
        table = table.set_column(SCHEMA.get_field_index(name), field, column)
    return table.cast(SCHEMA)


def concat_items(tables: Sequence[pa.Table]) -> pa.Table:
    """One table after the other; an empty table of `SCHEMA` for none."""
    return pa.concat_tables([t.cast(SCHEMA) for t in tables]) if tables else SCHEMA.empty_table()


def write_items(path: Path, table: pa.Table, metadata: Mapping[str, Any]) -> None:
    """Write the table atomically, with a JSON document in the file's metadata."""
    write_table(path, table.cast(SCHEMA), metadata)


def read_items(path: Path) -> tuple[pa.Table, dict[str, Any]]:
    """The table and the JSON document that `write_items` put there.

    Raises:
        MissingInputError: there is no such file.
        DataError: it is damaged, or not a table of `SCHEMA`, or of the first release's.
    """
    try:
        table, metadata = read_table(path, again="Delete it and score again")
        names = table.schema.names
        if missing := [name for name in _OF_FIRST_RELEASE if name not in names]:
            raise DataError(f"{path} is not a per-item table: it has no column {missing[0]!r}")
        if "value" not in names:
            table = table.append_column("value", pc.cast(table["correct"], pa.float64()))
            table = table.append_column("value_kind", pa.array(["correct"] * table.num_rows))
        for name in SCHEMA.names:
            if name not in table.schema.names:
                table = table.append_column(name, pa.nulls(table.num_rows, SCHEMA.field(name).type))
        return table.select(SCHEMA.names).cast(SCHEMA), metadata
    except MissingInputError:
        raise MissingInputError(f"{path} does not exist: this checkpoint has not been scored") from None
    except (pa.ArrowException, ValueError, KeyError) as e:
        raise DataError(f"{path} is not a readable Parquet file: {e}. Delete it and score again") from e
