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
        (("multiple_choice", "code_evaluation\n  pass_at_k: 1"), "does not score"),
        (("multiple_choice", "multiple_choice\n  cot_delimiter: x"), "goes with generation_task_with_answers only"),
        (("multiple_choice", "question_answering\n  early_stopping_criteria: ['what?']"), "regular expression"),
        (("multiple_choice", "question_answering\n  generation_kwargs: {do_sample: true}"), "do_sample"),
        (("multiple_choice", "multiple_choice\n  category_names: [a]"), "without has_categories"),
        (("multiple_choice", "multiple_choice\n  prelimiter: a\n  question_prelimiter: b"), "its other name"),
        (("icl_tasks:", "averages: {mine: [copa/1-shot]}\nicl_tasks:"), "copa/1-shot"),
        (("num_fewshot:", "num_fewshots:"), "did you mean 'num_fewshot'"),
        (("  dataset_uri: eval/local_data/copa.jsonl\n", ""), "dataset_uri"),
        (("[0, 5]", "[0, 0]"), "repeats"),
        (("[0, 5]", "[-1]"), "num_fewshot"),
        (("multiple_choice", "schema\n  metric_names: [InContextLearningLMAccuracy]"), "Accuracy"),
        (("label: copa", "label: a/b"), "label"),
        (("icl_tasks:", "eval_gauntlet: {}\nicl_tasks:"), "eval_gauntlet"),
        (("icl_tasks:", "overrides: {piqa: {num_fewshot: [1]}}\nicl_tasks:"), "'piqa', which is not a task"),
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


def test_openlms_own_yaml_loads_and_says_what_it_leaves_out(tmp_path):
    text = """
max_seq_len: 1024
seed: 1
precision: fp32
tokenizer: {name: EleutherAI/gpt-neox-20b, kwargs: {model_max_length: "${max_seq_len}"}}
models: [{model_name: open_lm}]
device_eval_batch_size: 8
fsdp_config: {sharding_strategy: FULL_SHARD}
icl_tasks:
- label: mmlu
  dataset_uri: local_data/mmlu.jsonl
  num_fewshot: [0]
  icl_task_type: multiple_choice
  continuation_delimiter: 'Answer: '
  has_categories: true
- {label: qa, dataset_uri: qa.jsonl, num_fewshot: [1], icl_task_type: question_answering, max_seq_len: "${max_seq_len}",
   metric_names: [InContextLearningQAAccuracy]}
"""
    suite = load_suite(_write(tmp_path, text))
    assert suite.ignored == (*("seed", "precision", "tokenizer", "models", "device_eval_batch_size", "fsdp_config"),)
    assert [(t.label, t.max_seq_len, t.rule) for t in suite.icl_tasks] == [
        ("mmlu", 1024, "mean"),
        ("qa", 1024, "prefix"),
    ]


def test_tasks_may_stand_in_a_file_of_their_own(tmp_path):
    (tmp_path / "tasks.yaml").write_text(COPA)
    suite = load_suite(_write(tmp_path, "icl_tasks: tasks.yaml\nmodel_name_or_path: x\n"))
    assert [t.label for t in suite.icl_tasks] == ["copa"]
    with pytest.raises(ConfigError, match="other.yaml, which is neither"):
        load_suite(_write(tmp_path, "icl_tasks: other.yaml\n"))


def test_the_openlm_suite_is_that_of_openlms_tables():
    suite = load_suite("openlm")
    assert len(suite.icl_tasks) == 12
    assert {k for task, k in suite.runs() if task.label == "mmlu"} == {0, 5}
    assert len(suite.headline) == 11
    assert not {"triviaqa/0-shot", "mmlu/5-shot"} & set(suite.headline)
    assert len(next(t for t in suite.icl_tasks if t.label == "mmlu").category_names) == 57


def test_the_two_prompt_versions_differ_in_the_line_break_alone():
    glued, newline = load_suite("openlm"), load_suite("openlm-newline")
    assert glued.digest != newline.digest
    assert newline.headline == glued.headline
    for a, b in zip(glued.icl_tasks, newline.icl_tasks, strict=True):
        assert a.continuation_delimiter == b.continuation_delimiter.lstrip("\n")
        assert a.model_dump(exclude={"continuation_delimiter"}) == b.model_dump(exclude={"continuation_delimiter"})


def test_the_gauntlet_has_its_five_categories():
    suite = load_suite("gauntlet")
    assert len(suite.categories) == 5
    assert sum(map(len, suite.categories.values())) == 31
