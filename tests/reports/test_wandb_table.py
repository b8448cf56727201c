"""The scores table in Weights & Biases, offline."""

import json

import pytest

from openlm_pipeline.reports import milestones_table
from openlm_pipeline.reports.wandb_table import log_table, wandb_table

wandb = pytest.importorskip("wandb")


def test_the_table_is_logged_and_holds_the_cells(tmp_path, monkeypatch, cards, baseline, published):
    monkeypatch.setenv("WANDB_SILENT", "true")
    table = milestones_table("demo", "v1", cards, baselines=[baseline], quoted=[published])
    made = wandb_table(table)
    rows = [dict(zip(made.columns, row)) for row in made.data]
    assert [(r["model"], r["kind"]) for r in rows] == [(r.label, r.kind) for r in table.rows]
    assert rows[0]["choice/0-shot"] == 0.31 and rows[1]["harder/0-shot"] is None
    assert rows[1]["harder/0-shot status"] == "failed" and rows[-1]["harder/0-shot status"] == "n/a"
    with wandb.init(mode="offline", dir=tmp_path, project="test") as run:
        log_table(table, run)
    (stored,) = tmp_path.rglob("*.table.json")
    assert json.loads(stored.read_text())["columns"] == made.columns
