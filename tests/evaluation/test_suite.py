"""Suites: LLM Foundry's YAML loads with its defaults; what would not be followed is refused with the reason."""

from pathlib import Path

import pytest

from openlm_pipeline.errors import ConfigError
from openlm_pipeline.evaluation.suite import load_suite

COPA = """
icl_tasks:
- label: copa
  dataset_uri: eval/local_data/copa.jsonl
  num_fewshot: [0, 5]
  icl_task_type: multiple_choice
"""


def _write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    return path


def test_shipped_demo_suite_has_the_three_task_types():
    suite = load_suite("demo")
    assert {t.label: t.icl_task_type for t in suite.icl_tasks} == {
        "last_word": "language_modeling",
        "continuation": "multiple_choice",
        "context_choice": "schema",
    }
    assert [k for _, k in suite.runs()] == [0, 0, 0]


def test_foundry_yaml_takes_foundry_defaults(tmp_path):
    empty = "  prompt_string: # this goes at the beginning of each input\n  batch_size: 8\n"
    suite = load_suite(_write(tmp_path, COPA + empty))
    (task,) = suite.icl_tasks
    assert (suite.name, suite.version) == ("mine", "v1")
    assert (task.continuation_delimiter, task.example_delimiter, task.prompt_string) == (" ", "\n", "")
    assert (task.fewshot_random_seed, task.has_categories, task.strip_dataset) == (1234, False, True)
    assert [(t.label, k) for t, k in suite.runs()] == [("copa", 0), ("copa", 5)]


def test_digest_follows_what_changes_scores_only(tmp_path):
    base = load_suite(_write(tmp_path, COPA)).digest
    assert load_suite(_write(tmp_path, COPA + "  batch_size: 8\n")).digest == base
    assert load_suite(_write(tmp_path, COPA.replace("eval/local_data/", "elsewhere/"))).digest == base
    assert load_suite(_write(tmp_path, COPA + '  continuation_delimiter: "\\nAnswer: "\n')).digest != base
    assert load_suite(_write(tmp_path, COPA.replace("[0, 5]", "[0]"))).digest != base


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (("multiple_choice", "generation_task_with_answers\n  cot_delimiter: x"), "does not score"),
        (("num_fewshot:", "num_fewshots:"), "did you mean 'num_fewshot'"),
        (("  dataset_uri: eval/local_data/copa.jsonl\n", ""), "dataset_uri"),
        (("[0, 5]", "[0, 0]"), "repeats"),
        (("[0, 5]", "[-1]"), "num_fewshot"),
        (("multiple_choice", "schema\n  metric_names: [InContextLearningLMAccuracy]"), "Accuracy"),
        (("label: copa", "label: a/b"), "label"),
        (("icl_tasks:", "eval_gauntlet: {}\nicl_tasks:"), "eval_gauntlet"),
        (("icl_tasks:", "icl_tasks: ]"), "not valid YAML"),
    ],
)
def test_what_would_not_be_followed_is_refused(tmp_path, change, says):
    assert change[0] in COPA
    with pytest.raises(ConfigError, match="mine.yaml") as e:
        load_suite(_write(tmp_path, COPA.replace(*change)))
    assert says in str(e.value)


def test_two_tasks_of_one_label_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="two tasks are labelled 'copa'"):
        load_suite(_write(tmp_path, COPA + COPA.replace("icl_tasks:", "")))


def test_an_unknown_suite_names_the_nearest():
    with pytest.raises(ConfigError, match="did you mean 'demo'"):
        load_suite("dmeo")
    with pytest.raises(ConfigError, match="no suite file"):
        load_suite("nowhere/suite.yaml")
