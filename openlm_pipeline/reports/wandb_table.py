"""The scores table in Weights & Biases. Needs the extra `wandb`."""

from typing import TYPE_CHECKING, Any

from openlm_pipeline.errors import MissingInputError
from openlm_pipeline.reports.table import Table

if TYPE_CHECKING:
    import wandb


def wandb_table(table: Table) -> "wandb.Table":
    """One row a model: its name, kind, tokens, and for each column the value and the ends of its 95% interval.

    Raises:
        MissingInputError: wandb is not installed.
    """
    try:
        import wandb
    except ImportError:
        raise MissingInputError("wandb is not installed; `pip install 'openlm-pipeline[wandb]'`") from None
    names = ["model", "kind", "tokens"]
    for column in table.columns:
        names += [column.key, f"{column.key} low", f"{column.key} high", f"{column.key} status"]
    rows: list[list[Any]] = []
    for row in table.rows:
        values: list[Any] = [row.label, row.kind, row.tokens]
        for cell in row.cells:
            values += [cell.value, cell.low, cell.high, cell.status]
        rows.append(values)
    return wandb.Table(columns=names, data=rows, allow_mixed_types=True)


def log_table(table: Table, run: "wandb.Run", name: str = "scores") -> None:
    """Log the table to a run that is open."""
    run.log({name: wandb_table(table)})
