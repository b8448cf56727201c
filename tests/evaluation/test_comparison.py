"""Two models on the same items: what differs is paired, corrected and refused where the items are not the same."""

import numpy as np
import pyarrow as pa
import pytest

from openlm_pipeline.evaluation import statistics as st
from openlm_pipeline.evaluation.averages import AverageDefinition
from openlm_pipeline.evaluation.comparison import compare
from openlm_pipeline.evaluation.items import SCHEMA, items_table

PLAIN = AverageDefinition("both", "accuracy", {"a/0-shot": 0.5, "b/0-shot": 0.5})
CENTRED = AverageDefinition("both_centred", "centred", {"a/0-shot": 0.5, "b/0-shot": 0.5})
CHANCES = {"a/0-shot": 0.5, "b/0-shot": 0.0}


def table(correct, categories=None, prompt="p"):
    common = dict.fromkeys(("run", "suite", "suite_version", "task", "metric"), "x")
    numbers = {"num_fewshot": 0, "num_choices": 2, "gold": 0, "num_tokens": 1}
    return items_table(
        [
            common
            | numbers
            | {
                "category": categories[i] if categories else None,
                "item": i,
                "item_hash": f"row {i}",
                "prompt_hash": f"{prompt} {i}",
                "correct": bool(hit),
            }
            for i, hit in enumerate(correct)
        ]
    )


def differences(ours, theirs, averages=(PLAIN,), same_prompts=True):
    found = compare(ours, theirs, "t1", averages=averages, chances=CHANCES, same_prompts=same_prompts)
    assert {d.against for d in found} == {"t1"}
    return {d.measure: d for d in found}


def test_a_task_has_a_paired_interval_and_mcnemars_test():
    ours = {"a/0-shot": table([1] * 60 + [0] * 40)}
    theirs = {"a/0-shot": table([1] * 45 + [0] * 50 + [1] * 5)}  # 15 gained, 5 lost
    found = differences(ours, theirs, ())["a/0-shot"]
    assert found.delta == pytest.approx(0.10)
    assert (found.ci_low, found.ci_high) == st.paired_interval(15, 5, 100)
    assert found.p_value == found.p_holm == st.mcnemar_exact(5, 15)
    assert found.significant
    # 22 of 102 discordant: nearer to what these two can show than the 19.8 points of two independent models.
    assert found.mde == pytest.approx(0.127, abs=0.002)


def test_an_average_is_the_weighted_sum_of_paired_differences():
    ours = {"a/0-shot": table([1] * 60 + [0] * 40), "b/0-shot": table([1] * 30 + [0] * 170)}
    theirs = {"a/0-shot": table([1] * 45 + [0] * 50 + [1] * 5), "b/0-shot": table([1] * 20 + [0] * 180)}
    found = differences(ours, theirs, (PLAIN, CENTRED))
    assert found["both"].delta == pytest.approx((0.10 + 0.05) / 2)
    errors = st.paired_standard_error(15, 5, 100), st.paired_standard_error(10, 0, 200)
    half = 1.959964 * (errors[0] ** 2 + errors[1] ** 2) ** 0.5 / 2
    assert found["both"].ci_high - found["both"].delta == pytest.approx(half)
    assert found["both"].p_value == pytest.approx(st.normal_p_value(0.075, half / 1.959964))
    assert found["both_centred"].delta == pytest.approx((0.10 / 0.5 + 0.05) / 2)
    half = 1.959964 * ((errors[0] / 0.5) ** 2 + errors[1] ** 2) ** 0.5 / 2
    assert found["both_centred"].delta - found["both_centred"].ci_low == pytest.approx(half)


def test_the_paired_interval_of_an_average_is_narrower_where_models_err_alike():
    rng = np.random.default_rng(0)
    hard = rng.random(1000)
    ours, theirs = (np.where(rng.random(1000) < 0.1, rng.random(1000), hard) < a for a in (0.55, 0.5))
    found = differences({"a/0-shot": table(ours)}, {"a/0-shot": table(theirs)}, ())["a/0-shot"]
    unpaired = 1.96 * (2 * 0.25 / 1000) ** 0.5
    assert (found.ci_high - found.ci_low) / 2 < 0.7 * unpaired


def test_the_intervals_hold_the_truth_as_often_as_they_say():
    rng = np.random.default_rng(1)
    blank, held = table([0] * 150), 0
    at = blank.schema.get_field_index("correct")

    def with_correct(correct):
        return blank.set_column(at, SCHEMA.field("correct"), pa.array(correct))

    for _ in range(400):
        outcomes = rng.choice(3, size=(2, 150), p=[0.15, 0.10, 0.75])  # only ours right, only theirs, neither
        ours = {name: with_correct(outcome == 0) for name, outcome in zip(CHANCES, outcomes)}
        theirs = {name: with_correct(outcome == 1) for name, outcome in zip(CHANCES, outcomes)}
        average = differences(ours, theirs)["both"]
        held += average.ci_low <= 0.05 <= average.ci_high
    assert 0.92 <= held / 400 <= 0.98


def test_a_task_with_categories_differs_by_the_mean_of_their_differences():
    categories = ["law"] * 90 + ["art"] * 10
    ours, theirs = table([0] * 90 + [1] * 10, categories), table([0] * 100, categories)
    found = differences({"a/0-shot": ours}, {"a/0-shot": theirs}, ())["a/0-shot"]
    assert found.delta == pytest.approx(0.5)  # not the 0.1 of all items together
    error = (st.paired_standard_error(0, 0, 90) ** 2 + st.paired_standard_error(10, 0, 10) ** 2) ** 0.5 / 2
    assert found.ci_high == pytest.approx(0.5 + 1.959964 * error)
    assert found.p_value == pytest.approx(st.normal_p_value(0.5, error))


def test_tasks_are_one_family_of_tests_and_the_other_averages_another():
    ours = {"a/0-shot": table([1] * 60 + [0] * 40), "b/0-shot": table([1] * 60 + [0] * 40)}
    theirs = {"a/0-shot": table([1] * 50 + [0] * 50), "b/0-shot": table([1] * 57 + [0] * 43)}
    third = AverageDefinition("only_b", "accuracy", {"b/0-shot": 1.0})
    found = differences(ours, theirs, (PLAIN, CENTRED, third))
    a, b = found["a/0-shot"], found["b/0-shot"]
    assert [a.p_holm, b.p_holm] == st.holm([a.p_value, b.p_value])
    assert found["both"].p_holm == found["both"].p_value
    rest = [found["both_centred"], found["only_b"]]
    assert [d.p_holm for d in rest] == st.holm([d.p_value for d in rest])
    assert a.significant and not b.significant


def test_models_that_agree_everywhere_do_not_differ():
    same = {"a/0-shot": table([1, 0] * 10), "b/0-shot": table([1] * 20)}
    for found in differences(same, same).values():
        assert (found.delta, found.p_value, found.significant) == (0.0, 1.0, False)
        assert found.ci_low < 0 < found.ci_high and found.mde > 0


def test_another_tokenizer_is_compared_but_not_between_milestones_of_a_run():
    ours, theirs = {"a/0-shot": table([1, 0] * 10)}, {"a/0-shot": table([1, 1] * 10, prompt="other ids")}
    assert differences(ours, theirs, (), same_prompts=False)["a/0-shot"].delta == -0.5
    refused = differences(ours, theirs, ())["a/0-shot"]
    assert refused.delta is None and not refused.significant and "other items or prompts" in refused.note


def test_what_cannot_be_compared_leaves_no_average_and_says_why():
    ours = {"a/0-shot": table([1, 0] * 10), "b/0-shot": table([1] * 20)}
    shorter = {"a/0-shot": table([1, 0] * 9), "b/0-shot": table([1] * 20)}
    found = differences(ours, shorter, same_prompts=False)
    assert found["both"].delta is None and found["both"].note == "a/0-shot: other items than at t1"
    found = differences(ours, {"a/0-shot": ours["a/0-shot"], "b/0-shot": SCHEMA.empty_table()})
    assert found["both"].note == "b/0-shot: not scored at t1"
    found = differences({"a/0-shot": ours["a/0-shot"]}, ours)
    assert found["both"].note == "b/0-shot has no score here"
    assert found["a/0-shot"].delta == 0


def test_the_order_of_rows_does_not_matter():
    ours, theirs = table([1, 1, 0, 0] * 5), table([1, 0, 1, 0] * 5)
    expected = differences({"a/0-shot": ours}, {"a/0-shot": theirs}, ())
    assert differences({"a/0-shot": ours}, {"a/0-shot": theirs.take(list(range(19, -1, -1)))}, ()) == expected
