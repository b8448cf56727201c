"""CORE: 22 tasks, DCLM's shots and baselines of both versions, and its aggregation."""

import csv
import json
from pathlib import Path

import pytest
import yaml

from openlm_pipeline.evaluation.averages import suite_averages
from openlm_pipeline.evaluation.estimates import Estimate
from openlm_pipeline.evaluation.scorecard import Provenance, make_scorecard
from openlm_pipeline.evaluation.scores import Measured, TaskScore, score_average
from openlm_pipeline.evaluation.suite import Suite, load_suite
from openlm_pipeline.evaluation.suite_files import suite_path
from openlm_pipeline.lineage.verify_release import recomputed
from openlm_pipeline.models.transformer import Transformer
from openlm_pipeline.pipeline.release import about_averages
from openlm_pipeline.storage.home import Home

import numpy as np  # isort: skip

V2_PERCENT = {"commonsense_qa": 40.3, "agi_eval_lsat_ar": 25, "bigbench_language_identification": 25, "boolq": 62}
V1_PERCENT = {"commonsense_qa": 20, "agi_eval_lsat_ar": 20, "bigbench_language_identification": 9.1, "boolq": 62}


def core() -> Suite:
    return load_suite("core")


def centred_mean(accuracies: dict[str, float], version: dict[str, float]) -> float:
    """As DCLM's aggregated_metrics.py: the mean of (accuracy - b/100) / (1 - b/100)."""
    percent = {"hellaswag_zeroshot": 25, "arc_easy": 25, "arc_challenge": 25, "copa": 50, "piqa": 50, "openbook_qa": 25,
               "hellaswag": 25, "winograd": 50, "winogrande": 50} | version  # fmt: skip
    centred = [(a - 0.01 * (b := percent.get(name, 0))) / (1 - 0.01 * b) for name, a in accuracies.items()]
    return sum(centred) / len(centred)


def measured(name: str, k: int, accuracy: float) -> Measured:
    known = {"metric": "m", "rule": "mean", "num_items": 100, "chance": 0.0, "mde": 0.1, "centred": accuracy}
    score = TaskScore(task=name, num_fewshot=k, accuracy=accuracy, status="scored", **known)
    estimate = Estimate(accuracy, accuracy - 0.1, accuracy + 0.1, 0.05, np.array([hash(name)]), np.array([0.1]), 100)
    return Measured(score, estimate)


def of_accuracies(accuracies: dict[str, float]) -> dict[str, float]:
    suite = core()
    scores = {f"{t.label}/{k}-shot": measured(t.label, k, accuracies[t.label]) for t, k in suite.runs()}
    definitions = suite_averages(suite, dict.fromkeys(scores, 1000))
    return {d.name: score_average(d, scores, None).value for d in definitions if d.kind != "bits_per_byte"}


def test_it_has_dclms_tasks_in_its_shots():
    shots = {task.label: k for task, k in core().runs()}
    assert len(shots) == 22
    zero = {"hellaswag_zeroshot", "copa", "openbook_qa", "lambada_openai", "winograd", "winogrande", "coqa"}
    assert {name for name, k in shots.items() if k == 0} == zero and shots["agi_eval_lsat_ar"] == 3
    assert [t.label for t in core().icl_tasks if t.has_categories] == ["jeopardy"]
    assert len([t for t in core().icl_tasks if t.published_sha256]) == 18


def test_both_versions_are_dclms_means_of_centred_accuracies():
    accuracies = {task.label: 0.3 + 0.02 * i for i, task in enumerate(core().icl_tasks)}
    found = of_accuracies(accuracies)
    assert list(found)[0] == "core"
    assert found["core"] == pytest.approx(centred_mean(accuracies, V2_PERCENT), abs=1e-12)
    assert found["core_v1"] == pytest.approx(centred_mean(accuracies, V1_PERCENT), abs=1e-12)
    assert found["low_variance"] == pytest.approx(sum(accuracies.values()) / 22)


def test_every_model_that_dclm_published(shared_data: Path):
    rows = list(csv.DictReader((shared_data / "dclm_core_rows.csv").open()))
    assert len(rows) == 156
    names = [task.label for task in core().icl_tasks]
    for row in rows:
        found = of_accuracies({name: float(row[name]) for name in names})
        assert (found["core"], found["core_v1"]) == pytest.approx(
            (float(row["core_v2"]), float(row["core_v1"])), abs=5e-6
        )


def rows_of(kind: str, i: int, has_categories: bool) -> dict:
    words = ["red", "blue", "green", "old"]
    row = {"category": "ab"[i % 2]} if has_categories else {}
    if kind == "multiple_choice":
        return {**row, "query": f"the cat saw number {i}", "choices": words, "gold": i % 4}
    if kind == "schema":
        options = [f"the cat {i} saw the dog as it", f"the dog {i} saw the cat as it"]
        return {**row, "context_options": options, "continuation": "ran", "gold": i % 2}
    return {**row, "context": f"the cat saw number {i} and", "continuation": words[i % 4]}


@pytest.fixture
def core_files(home: Home, monkeypatch: pytest.MonkeyPatch) -> list[dict]:
    document = yaml.safe_load(suite_path("core").read_text())
    monkeypatch.setenv("OPENLM_EVAL_DATA", str(home.root / "data"))
    for task in document["icl_tasks"]:
        path = home.root / "data" / task["dataset_uri"].partition("}/")[2]
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = [rows_of(task["icl_task_type"], i, task.get("has_categories", False)) for i in range(14)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return document["icl_tasks"]


def test_core_of_rows_from_prompt_to_headline(core_files: list[dict], scored, model: Transformer):
    card, result = scored(core(), model, 128)
    accuracies: dict[str, list[float]] = {}
    for row in result.items.to_pylist():
        accuracies.setdefault((row["task"], row["category"]), []).append(row["correct"])
    means: dict[str, list[float]] = {}
    for (task, _), right in accuracies.items():
        means.setdefault(task, []).append(sum(right) / len(right))
    of_tasks = {task: sum(parts) / len(parts) for task, parts in means.items()}
    assert card.headline.name == "core" and card.headline.random_baselines == "dclm_v2"
    assert card.average == pytest.approx(centred_mean(of_tasks, V2_PERCENT), abs=1e-9)
    assert card.headline.ci_low < card.average < card.headline.ci_high
    assert sum("is not the file that published scores are of" in w for w in card.warnings) == 18


def test_fewer_than_all_tasks_are_no_core(core_files: list[dict], home: Home):
    suite = core()
    from openlm_pipeline.evaluation.items import SCHEMA

    named = Provenance(run="r", checkpoint_digest="x", tokenizer="t")
    card = make_scorecard(SCHEMA.empty_table(), None, suite=suite, provenance=named, task_files={})
    assert card.average is None and "coqa/0-shot" in card.headline.missing


def test_a_release_recomputes_each_number_from_the_items(core_files: list[dict], scored, model: Transformer):
    """With categories, generation, and centred and weighted averages; one item judged otherwise is found."""
    card, result = scored(core(), model, 128)
    rows, dumped = json.loads(json.dumps(result.items.to_pylist())), card.model_dump(mode="json")
    averages = about_averages(core(), card)
    numbers, wrong = recomputed(dumped, rows, averages)
    assert (numbers, wrong) == (2 * len(card.tasks) + len(card.averages), [])
    row = next(row for row in rows if row["task"] == "jeopardy")
    row["correct"] = not row["correct"]
    assert recomputed(dumped, rows, averages)[1][0].startswith("jeopardy/")
