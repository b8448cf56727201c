"""Run against run: the same items, both numbers, one corrected p-value each; what was scored otherwise is refused."""

import csv
import io
import json
import shutil
from pathlib import Path

import pyarrow as pa
import pytest
from commands import openlm

from openlm_pipeline.evaluation import statistics
from openlm_pipeline.evaluation.items import read_items, write_items
from openlm_pipeline.evaluation.scorecard import load_scorecard, save_scorecard
from openlm_pipeline.reports.compare import Scored, compared


@pytest.fixture
def pipeline(finished, tmp_path):
    return finished.copy(tmp_path)


def scored(folder: Path, title: str) -> Scored:
    card = load_scorecard(folder / "scorecard.json")
    return Scored(title, card.tokens, card, read_items(folder / "items.parquet")[0])


def twin_of(pipeline, **changes) -> Path:
    """A second recipe whose milestones were scored as those of the first, with changes to its scorecards; and at one
    of them on every item of `choice` right, with likelier answers."""
    (Path(pipeline.variables["OPENLM_RECIPES"]) / "twin.yaml").write_text("extends: tiny\nname: twin\n")
    folder = pipeline.home / "scorecards" / "twin" / "v1"
    shutil.copytree(pipeline.home / "scorecards" / "tiny" / "v1", folder)
    for place in folder.iterdir():
        card = load_scorecard(place / "scorecard.json")
        save_scorecard(place, card.model_copy(update={"run": "twin"} | changes))
    table, metadata = read_items(folder / "t0040K" / "items.parquet")
    rows = [
        row | ({"correct": True} if row["task"] == "choice" else {}) | {"nll": row["nll"] / 2}
        for row in table.to_pylist()
    ]
    write_items(folder / "t0040K" / "items.parquet", pa.Table.from_pylist(rows, schema=table.schema), metadata)
    save_scorecard(folder / "t0040K", load_scorecard(folder / "t0040K" / "scorecard.json"))
    return folder


def test_two_runs_meet_at_the_last_milestone_that_both_have(pipeline):
    twin_of(pipeline)
    shown = openlm("compare", "tiny", "twin", "--format", "csv", variables=pipeline.variables)
    assert shown.returncode == 0, shown.stderr
    rows = {(r["measure"], r["kind"]): r for r in csv.DictReader(io.StringIO(shown.stdout))}
    assert {m for m, _ in rows} == {"average", "last_word/0-shot", "choice/1-shot", "average at 10K"}
    likelier = rows["choice/1-shot", "bits_per_byte"]
    assert float(likelier["a"]) > 0 and float(likelier["delta"]) > 0 and likelier["better"] == "False"
    assert float(rows["average at 10K", "accuracy"]["delta"]) == 0
    tested = [r for r in rows.values() if r["p_value"]]
    corrected = statistics.holm([float(r["p_value"]) for r in tested])
    assert [float(r["p_holm"]) for r in tested] == pytest.approx(corrected)  # over all that is shown


def test_the_page_has_the_curves_of_both_and_loads_nothing(pipeline, tmp_path):
    twin_of(pipeline)
    page = tmp_path / "page.html"
    shown = openlm("compare", "tiny", "twin", "--html", page, variables=pipeline.variables | {"COLUMNS": "200"})
    assert shown.returncode == 0, shown.stderr
    assert "twin 40K is" in shown.stdout and "▼" in shown.stdout
    assert "rules: argmax: last_word/0-shot; mean: choice/1-shot" in shown.stdout
    text = page.read_text()
    assert "<script" not in text and "http" not in text
    for title in ("average accuracy", "bits per byte of the right answers"):
        assert f">{title}<" in text
    assert ">twin " in text and ">tiny " in text


def test_any_two_scorecards_by_milestone_or_folder(pipeline):
    folder = pipeline.home / "scorecards" / "tiny" / "v1" / "t0010K"
    by_name = openlm("compare", "tiny@40K", "tiny@10K", "--format", "csv", variables=pipeline.variables)
    by_folder = openlm("compare", "tiny@t0040K", folder, "--format", "csv", variables=pipeline.variables)
    assert by_name.returncode == 0 and by_name.stdout == by_folder.stdout
    card = load_scorecard(pipeline.home / "scorecards" / "tiny" / "v1" / "t0040K" / "scorecard.json")
    changes = {d.measure: d.delta for d in card.changes if d.kind == "accuracy"}
    rows = [r for r in csv.DictReader(io.StringIO(by_name.stdout)) if r["kind"] == "accuracy"]
    shown = {r["measure"].replace("average", "all_tasks"): float(r["delta"]) for r in rows}
    assert shown == pytest.approx({name: changes[name] for name in shown})


@pytest.mark.parametrize("changes", [{"precision": "bf16"}, {"suite_digest": "0" * 64}, {"harness_version": "1"}])
def test_models_scored_otherwise_are_refused_by_name(pipeline, changes):
    twin_of(pipeline, **changes)
    refused = openlm("compare", "tiny", "twin", variables=pipeline.variables)
    assert refused.returncode == 4 and f"differ in {next(iter(changes))}" in refused.stderr


@pytest.mark.parametrize(
    ("name", "said"), [("tiny@3K", "it has t0010K, 10K"), ("nothing", "no recipe"), ("demo", "openlm evaluate demo")]
)
def test_what_is_not_there_is_named(pipeline, name, said):
    result = openlm("compare", "tiny", name, variables=pipeline.variables)
    assert result.returncode in (2, 3) and said in result.stderr


def test_other_items_are_no_comparison(pipeline):
    folder = twin_of(pipeline) / "t0040K"
    a, b = scored(pipeline.home / "scorecards" / "tiny" / "v1" / "t0040K", "a"), scored(folder, "b")
    other = Scored(b.title, b.tokens, b.card, b.items.slice(1))
    found = compared((a, other))
    assert "other items" in json.dumps(found.rows)
    assert "a and b can't be compared" in found.headline
