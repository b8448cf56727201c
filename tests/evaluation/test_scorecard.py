"""A scorecard derives from items alone, never averages over missing tasks or categories, and pairs what it compares."""

import pytest

from openlm_pipeline.errors import ConfigError, DataError, MissingInputError
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
TRIVIA = _task("triviaqa", "generation_task_with_answers")
FILES = {f"{label}/0-shot": f"sha-{label}" for label in ("copa", "lambada", "mmlu", "triviaqa", "my_task")}


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
    suite = changes.pop("suite", None) or Suite(name="s", icl_tasks=tasks, random_baselines="v1")
    settings = {"suite": suite, "provenance": provenance(), "task_files": FILES} | changes
    return make_scorecard(items_table(now), None if before is None else items_table(before), **settings)


def test_scores_and_averages_are_those_of_the_items():
    now = rows(MC, [True] * 55 + [False] * 45) + rows(LM, [True] * 10 + [False] * 40)
    scorecard = card((MC, LM), now)
    copa, lambada = scorecard.tasks
    assert (copa.num_items, copa.accuracy, copa.chance, copa.rule, copa.status) == (100, 0.55, 0.5, "mean", "scored")
    assert (copa.ci_low, copa.ci_high) == wilson_interval(55, 100)
    assert copa.centred == pytest.approx(0.1)
    assert (copa.accuracy_sum, copa.accuracy_norm) == (0.0, 1.0)
    assert copa.mde == pytest.approx(0.198, abs=0.002)
    assert copa.task_file_sha256 == "sha-copa"
    assert (lambada.accuracy, lambada.chance, lambada.centred, lambada.rule) == (0.2, 0.0, 0.2, "argmax")
    assert lambada.accuracy_sum is None
    assert scorecard.headline.name == "all_tasks"
    assert scorecard.average == pytest.approx(0.375)
    above = copa.ci_high - 0.55, lambada.ci_high - 0.2
    below = 0.55 - copa.ci_low, 0.2 - lambada.ci_low
    assert scorecard.headline.ci_high - scorecard.average == pytest.approx((above[0] ** 2 + above[1] ** 2) ** 0.5 / 2)
    assert scorecard.headline.standard_error == pytest.approx((0.55 * 0.45 / 99 + 0.2 * 0.8 / 49) ** 0.5 / 2)
    assert scorecard.headline.mde == pytest.approx((copa.mde**2 + lambada.mde**2) ** 0.5 / 2)
    assert scorecard.headline.chance == 0.25
    centred = scorecard.averages[1]
    assert (centred.name, centred.kind, centred.random_baselines) == ("all_tasks_centred", "centred", "v1")
    assert (centred.value, centred.chance) == (pytest.approx(0.15), 0.0)
    half = ((below[0] / 0.5) ** 2 + below[1] ** 2) ** 0.5 / 2
    assert centred.value - centred.ci_low == pytest.approx(half)
    assert (scorecard.status, scorecard.missing, scorecard.changes) == ("complete", (), ())


def test_a_task_with_categories_counts_as_the_mean_of_its_categories():
    now = rows(MMLU, [True] * 10, category="law") + rows(MMLU, [False] * 90, category="art") + rows(LM, [True, False])
    scorecard = card((MMLU, LM), now)
    assert [t.name for t in scorecard.tasks] == ["mmlu/0-shot", "lambada/0-shot"]
    assert [t.name for t in scorecard.categories] == ["mmlu/0-shot/art", "mmlu/0-shot/law"]
    mmlu = scorecard.tasks[0]
    assert (mmlu.accuracy, mmlu.accuracy_micro, mmlu.num_items, mmlu.num_categories) == (0.5, 0.1, 100, 2)
    assert scorecard.average == pytest.approx((0.5 + 0.5) / 2)


def test_the_interval_of_a_task_with_categories_is_that_of_their_mean():
    half_right = [True, False] * 20
    now = rows(MMLU, half_right, category="law") + rows(MMLU, half_right * 2, category="art")
    mmlu = card((MMLU,), now).tasks[0]
    error = (0.25 / 39 + 0.25 / 79) ** 0.5 / 2
    assert mmlu.standard_error == pytest.approx(error)
    halves = [0.5 - wilson_interval(n / 2, n)[0] for n in (40, 80)]
    half = (halves[0] ** 2 + halves[1] ** 2) ** 0.5 / 2
    assert (mmlu.ci_low, mmlu.ci_high) == pytest.approx((0.5 - half, 0.5 + half))
    unpaired = [2.801585 * (2 * 0.25 / n) ** 0.5 for n in (40, 80)]
    assert mmlu.mde == pytest.approx((unpaired[0] ** 2 + unpaired[1] ** 2) ** 0.5 / 2)


def test_a_missing_category_fails_the_task():
    law_and_art = _task("mmlu", "multiple_choice", has_categories=True, category_names=("art", "law"))
    scorecard = card((law_and_art, LM), rows(MMLU, [True] * 10, category="law") + rows(LM, [True, False]))
    assert (scorecard.tasks[0].status, scorecard.tasks[0].problem) == ("failed", "no items of category art")
    assert scorecard.average is None and scorecard.categories == ()


def test_a_generation_task_is_scored_against_nothing_to_guess():
    written = {"nll": None, "generated": "Paris", "num_choices": 1, "choice_mean": None, "correct_sum": None}
    now = rows(TRIVIA, [True, False, False, False], **written, correct_norm=None)
    (trivia,) = card((TRIVIA,), now).tasks
    assert (trivia.accuracy, trivia.chance, trivia.centred, trivia.rule) == (0.25, 0.0, 0.25, "prefix")
    assert trivia.accuracy_sum is trivia.accuracy_norm is None


def test_chance_is_one_in_the_options_where_the_random_baselines_do_not_list_the_task():
    own = _task("my_task", "multiple_choice")
    (score,) = card((own,), rows(own, [True, False])).tasks
    assert score.chance == 0.25


def test_chance_is_that_of_the_rows_whatever_a_task_is_called():
    """Only a suite that names a version of random baselines, or a task's chance, has another."""
    siqa = _task("siqa", "multiple_choice")
    files = {"task_files": {"siqa/0-shot": "x"}}
    three = rows(siqa, [True, False] * 3, num_choices=3)
    chances = [
        card(None, three, suite=Suite(name="s", icl_tasks=(task,), random_baselines=version), **files).tasks[0].chance
        for task, version in ((siqa, None), (siqa, "v1"), (_task("siqa", "multiple_choice", chance=0.4), "v1"))
    ]
    assert chances == [pytest.approx(1 / 3), 0.5, 0.4]
    golds = [{**r, "gold": int(i % 3 > 0)} for i, r in enumerate(three)]
    (score,) = card(None, golds, suite=Suite(name="s", icl_tasks=(siqa,)), **files).tasks
    assert score.majority == pytest.approx(2 / 3)


def test_small_tasks_are_flagged_and_left_out_of_an_average_of_their_own():
    scorecard = card((MC, LM), rows(MC, [True] * 100) + rows(LM, [True, False] * 150))
    assert [t.small for t in scorecard.tasks] == [True, False]
    by_name = {a.name: a for a in scorecard.averages}
    assert list(by_name) == ["all_tasks", "without_small", "all_tasks_centred"]
    assert by_name["without_small"].tasks == ("lambada/0-shot",)
    assert (by_name["without_small"].value, scorecard.average) == (0.5, 0.75)


def test_a_suites_own_averages_and_categories():
    suite = Suite(
        name="s",
        icl_tasks=(MC, LM, MMLU),
        averages={"two": ("copa/0-shot", "lambada/0-shot"), "big": ("lambada/0-shot",)},
        categories={"sense": ("copa/0-shot",), "world": ("mmlu/0-shot", "lambada/0-shot")},
        random_baselines="v1",
    )
    now = rows(MC, [True] * 75 + [False] * 25) + rows(LM, [True, False] * 50)
    scorecard = card(None, now + rows(MMLU, [True] * 10, category="law"), suite=suite)
    values = {a.name: (a.kind, a.value) for a in scorecard.averages}
    assert values == {
        "two": ("accuracy", 0.625),
        "big": ("accuracy", 0.5),
        "two_centred": ("centred", 0.5),
        "sense": ("category", 0.5),
        "world": ("category", 0.75),
        "mean_of_categories": ("category", 0.625),
    }
    without = card(None, now, suite=suite)
    values = {a.name: a.value for a in without.averages}
    assert (values["two"], values["sense"], values["world"], values["mean_of_categories"]) == (0.625, 0.5, None, None)
    assert {a.name: a.missing for a in without.averages}["world"] == ("mmlu/0-shot",)


def test_an_average_and_a_category_of_one_name_are_refused():
    suite = Suite(name="s", icl_tasks=(MC,), averages={"all": ("copa/0-shot",)}, categories={"all": ("copa/0-shot",)})
    with pytest.raises(ConfigError, match="two averages named 'all'"):
        card(None, rows(MC, [True]), suite=suite)


def test_a_missing_task_leaves_no_average():
    scorecard = card((MC, LM), rows(MC, [True, False]))
    assert (scorecard.status, scorecard.missing) == ("incomplete", ("lambada/0-shot",))
    assert scorecard.average is None
    for average in scorecard.averages:
        assert (average.status, average.missing) == ("not run", ("lambada/0-shot",))
        assert average.value is average.ci_low is average.mde is None
    assert (scorecard.tasks[1].status, scorecard.tasks[1].accuracy) == ("not run", None)


BEFORE = {"milestone": "t0100K", "tokens": 100_000}


def by_measure(differences):
    return {d.measure: d for d in differences}


def test_changes_are_paired_and_corrected_for_the_number_of_tasks():
    now = rows(MC, [True] * 60 + [False] * 40) + rows(LM, [True] * 50 + [False] * 50)
    before = rows(MC, [True] * 40 + [False] * 60, **BEFORE) + rows(
        LM, [False] * 2 + [True] * 46 + [False] * 52, **BEFORE
    )
    changes = by_measure(card((MC, LM), now, before).changes)
    assert list(changes) == ["copa/0-shot", "lambada/0-shot", "all_tasks", "all_tasks_centred"]
    copa, lambada, average = changes["copa/0-shot"], changes["lambada/0-shot"], changes["all_tasks"]
    assert (copa.against, copa.delta) == ("t0100K", pytest.approx(0.2))
    assert copa.p_value == mcnemar_exact(0, 20)
    assert copa.p_holm == pytest.approx(2 * copa.p_value)
    assert copa.significant
    assert lambada.delta == pytest.approx(0.04)
    assert lambada.p_value == mcnemar_exact(0, 4)
    assert not lambada.significant
    assert average.delta == pytest.approx(0.12) and average.significant


def test_a_difference_within_the_noise_is_not_marked():
    now, before = [True, False] * 50, [False, True] * 49 + [True, True]
    changes = by_measure(card((MC,), rows(MC, now), rows(MC, before, **BEFORE)).changes)
    assert changes["copa/0-shot"].delta == pytest.approx(-0.01)
    assert not any(change.significant for change in changes.values())


def test_other_items_are_not_compared():
    now = rows(MC, [True] * 30) + rows(LM, [True] * 30)
    before = rows(MC, [False] * 30, prompt_hash="another prompt", **BEFORE)
    changes = by_measure(card((MC, LM), now, before).changes)
    copa, lambada = changes["copa/0-shot"], changes["lambada/0-shot"]
    assert copa.delta is None and not copa.significant and "other items or prompts" in copa.note
    assert lambada.p_value is None and "not scored at t0100K" in lambada.note
    assert changes["all_tasks"].delta is None


PYTHIA = {"run": "pythia_1b", "run_version": None, "milestone": None, "step": None}


def test_differences_to_any_milestone_and_to_a_baseline_with_another_tokenizer():
    now = rows(MC, [True] * 60 + [False] * 40)
    earlier = items_table(rows(MC, [True] * 40 + [False] * 60, **BEFORE))
    theirs = items_table([r | PYTHIA | {"tokens": None} for r in rows(MC, [True] * 70 + [False] * 30, prompt_hash="x")])
    scorecard = card((MC,), now, against=[("t0100K", earlier), ("pythia_1b", theirs)])
    assert scorecard.difference("all_tasks", "t0100K").delta == pytest.approx(0.2)
    found = scorecard.difference("copa/0-shot", "pythia_1b")
    assert (found.delta, found.p_value) == (pytest.approx(-0.1), mcnemar_exact(10, 0))
    assert scorecard.difference("copa/0-shot", "another") is None
    assert scorecard.changes == ()


def test_a_baseline_has_a_scorecard_without_a_milestone():
    items = items_table([r | PYTHIA | {"tokens": None} for r in rows(MC, [True, False])])
    named = Provenance(run="pythia_1b", checkpoint_digest="weights", tokenizer="own")
    scorecard = make_scorecard(items, None, suite=Suite(name="s", icl_tasks=(MC,)), provenance=named, task_files=FILES)
    assert (scorecard.label, scorecard.milestone, scorecard.tokens) == ("pythia_1b", None, None)
    assert Scorecard.from_json(scorecard.model_dump_json()) == scorecard


def test_another_suite_is_not_compared():
    other = items_table(rows(MC, [True], suite_version="v2", **BEFORE))
    with pytest.raises(DataError, match="t0100K are of suite_version 'v2'"):
        card((MC,), rows(MC, [True]), against=[("t0100K", other)])


def test_items_of_something_else_are_refused():
    with pytest.raises(DataError, match="milestone 't0100K'"):
        card((MC,), rows(MC, [True], **BEFORE))
    with pytest.raises(DataError, match="2 milestones"):
        card((MC,), rows(MC, [True]), rows(MC, [True], **BEFORE) + rows(MC, [True]))


def test_one_item_has_no_standard_error_but_a_scorecard():
    scorecard = card((MC,), rows(MC, [True]))
    assert scorecard.tasks[0].standard_error is None
    assert (scorecard.average, scorecard.headline.ci_low) == (1.0, wilson_interval(1, 1)[0])
    assert Scorecard.from_json(scorecard.model_dump_json()) == scorecard


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
