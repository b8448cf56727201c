"""A scorecard derives from items alone, never averages over missing tasks, and marks only significant changes."""

import pytest

from openlm_pipeline.errors import DataError, MissingInputError
from openlm_pipeline.evaluation.items import items_table, write_items
from openlm_pipeline.evaluation.scorecard import (
    Provenance,
    Scorecard,
    load_scorecard,
    make_scorecard,
    save_scorecard,
)
from openlm_pipeline.evaluation.statistics import mcnemar_exact, wilson_interval
from openlm_pipeline.evaluation.suite import IclTask, Suite


def _task(label: str, kind: str, **settings) -> IclTask:
    return IclTask(label=label, dataset_uri="x.jsonl", num_fewshot=(0,), icl_task_type=kind, **settings)


MC = _task("copa", "multiple_choice")
LM = _task("lambada", "language_modeling")
MMLU = _task("mmlu", "multiple_choice", has_categories=True)
FILES = {f"{label}/0-shot": f"sha-{label}" for label in ("copa", "lambada", "mmlu")}


def provenance(milestone="t0250K", tokens=250_000) -> Provenance:
    return Provenance(
        run="demo",
        run_version="v1",
        milestone=milestone,
        tokens=tokens,
        step=tokens // 1000,
        checkpoint_digest="weights",
        data_fingerprint="data",
        tokenizer="demo_bpe",
        validation_loss=3.5,
    )


def rows(task: IclTask, correct: list[bool], milestone="t0250K", tokens=250_000, category=None, **changes):
    picks = {f"choice_{r}": 0 for r in ("mean", "sum", "norm")} | {"correct_sum": False, "correct_norm": True}
    return [
        {
            "run": "demo",
            "run_version": "v1",
            "milestone": milestone,
            "step": tokens // 1000,
            "tokens": tokens,
            "suite": "s",
            "suite_version": "v1",
            "task": task.label,
            "num_fewshot": 0,
            "category": category,
            "item": i,
            "item_hash": f"row {category} {i}",
            "prompt_hash": f"prompt {category} {i}",
            "num_choices": 1 if task is LM else 4,
            "gold": 0,
            "correct": hit,
            "nll": 1.0,
            "num_tokens": 1,
            "metric": task.metric,
            **({} if task is LM else picks),
            **changes,
        }
        for i, hit in enumerate(correct)
    ]


def card(tasks, now, before=None, **changes) -> Scorecard:
    settings = {"suite": Suite(name="s", icl_tasks=tasks), "provenance": provenance(), "task_files": FILES} | changes
    return make_scorecard(items_table(now), None if before is None else items_table(before), **settings)


def test_scores_and_averages_are_those_of_the_items():
    now = rows(MC, [True] * 55 + [False] * 45) + rows(LM, [True] * 10 + [False] * 40)
    scorecard = card((MC, LM), now)
    copa, lambada = scorecard.tasks
    assert (copa.num_items, copa.accuracy, copa.chance, copa.rule, copa.status) == (100, 0.55, 0.25, "mean", "scored")
    assert (copa.ci_low, copa.ci_high) == wilson_interval(55, 100)
    assert copa.centred == pytest.approx(0.4)
    assert (copa.accuracy_sum, copa.accuracy_norm) == (0.0, 1.0)
    assert copa.mde == pytest.approx(0.198, abs=0.002)
    assert copa.task_file_sha256 == "sha-copa"
    assert (lambada.accuracy, lambada.chance, lambada.centred, lambada.rule) == (0.2, 0.0, 0.2, "argmax")
    assert lambada.accuracy_sum is None
    assert scorecard.average == pytest.approx(0.375)
    assert scorecard.centred_average == pytest.approx(0.3)
    half = 1.96 / 2 * (0.55 * 0.45 / 99 + 0.2 * 0.8 / 49) ** 0.5
    assert scorecard.average_ci_high - scorecard.average == pytest.approx(half, rel=1e-4)
    assert (scorecard.status, scorecard.missing, scorecard.changes) == ("complete", (), ())


def test_a_task_with_categories_counts_as_the_mean_of_its_categories():
    now = rows(MMLU, [True] * 10, category="law") + rows(MMLU, [False] * 90, category="art") + rows(LM, [True, False])
    scorecard = card((MMLU, LM), now)
    assert [t.name for t in scorecard.tasks] == ["mmlu/0-shot/art", "mmlu/0-shot/law", "lambada/0-shot"]
    assert scorecard.average == pytest.approx((0.5 + 0.5) / 2)


def test_a_missing_task_leaves_no_average():
    why = {"not_run": {"lambada/0-shot": "no file"}}
    scorecard = card((MC, LM), rows(MC, [True, False]), **why)
    assert (scorecard.status, scorecard.missing) == ("incomplete", ("lambada/0-shot",))
    assert scorecard.average is scorecard.centred_average is scorecard.average_ci_low is None
    assert (scorecard.tasks[1].status, scorecard.tasks[1].problem) == ("not run", "no file")
    assert scorecard.tasks[1].accuracy is None
    broken = card((MC, LM), rows(MC, [True, False]), failed={"lambada/0-shot": "line 3"})
    assert (broken.tasks[1].status, broken.tasks[1].problem) == ("failed", "line 3")
    silent = card((MC, LM), rows(MC, [True, False]))
    assert (silent.status, silent.tasks[1].status) == ("incomplete", "not run")


BEFORE = {"milestone": "t0100K", "tokens": 100_000}


def test_changes_are_paired_and_corrected_for_the_number_of_tasks():
    now = rows(MC, [True] * 60 + [False] * 40) + rows(LM, [True] * 50 + [False] * 50)
    before = rows(MC, [True] * 40 + [False] * 60, **BEFORE) + rows(
        LM, [False] * 2 + [True] * 46 + [False] * 52, **BEFORE
    )
    copa, lambada = card((MC, LM), now, before).changes
    assert (copa.previous_milestone, copa.delta) == ("t0100K", pytest.approx(0.2))
    assert copa.p_value == mcnemar_exact(0, 20)
    assert copa.p_holm == pytest.approx(2 * copa.p_value)
    assert copa.significant
    assert lambada.delta == pytest.approx(0.04)
    assert lambada.p_value == mcnemar_exact(0, 4)
    assert not lambada.significant


def test_a_difference_within_the_noise_is_not_marked():
    now, before = [True, False] * 50, [False, True] * 49 + [True, True]
    (change,) = card((MC,), rows(MC, now), rows(MC, before, **BEFORE)).changes
    assert change.delta == pytest.approx(-0.01)
    assert not change.significant


def test_other_items_are_not_compared():
    now = rows(MC, [True] * 30) + rows(LM, [True] * 30)
    before = rows(MC, [False] * 30, prompt_hash="another prompt", **BEFORE)
    copa, lambada = card((MC, LM), now, before).changes
    assert copa.delta is None and not copa.significant and "other items or prompts" in copa.note
    assert lambada.p_value is None and "not scored at t0100K" in lambada.note


def test_items_of_something_else_are_refused():
    with pytest.raises(DataError, match="milestone 't0100K'"):
        card((MC,), rows(MC, [True], **BEFORE))
    with pytest.raises(DataError, match="2 milestones"):
        card((MC,), rows(MC, [True]), rows(MC, [True], **BEFORE) + rows(MC, [True]))


def test_one_item_has_no_standard_error_but_a_scorecard():
    scorecard = card((MC,), rows(MC, [True]))
    assert scorecard.tasks[0].standard_error is None
    assert (scorecard.average, scorecard.average_ci_low) == (1.0, None)
    assert Scorecard.from_json(scorecard.to_json()) == scorecard


def test_saved_beside_its_items_and_loaded_equal(tmp_path):
    now = rows(MC, [True, False, True]) + rows(LM, [True, False])
    scorecard = card((MC, LM), now, rows(MC, [False, False, True], **BEFORE))
    with pytest.raises(MissingInputError, match="no items.parquet"):
        save_scorecard(tmp_path, scorecard)
    write_items(tmp_path / "items.parquet", items_table(now), {})
    path = save_scorecard(tmp_path, scorecard)
    assert path == tmp_path / "scorecard.json"
    assert load_scorecard(path) == scorecard
    path.write_text('{"run": "demo"}')
    with pytest.raises(DataError, match="scorecard.json"):
        load_scorecard(path)
    with pytest.raises(MissingInputError):
        load_scorecard(tmp_path / "none.json")
