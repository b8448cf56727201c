"""YAML files of OpenLM's and LLM Foundry's evaluation scripts: what changes scores is followed or refused."""

from pathlib import Path

import pytest

from openlm_pipeline.errors import ConfigError
from openlm_pipeline.evaluation.suite import load_suite
from openlm_pipeline.evaluation.suite_files import SHIPPED
from openlm_pipeline.strict import read_mapping

TASKS = """
icl_tasks:
- {label: copa, dataset_uri: eval/copa.jsonl, num_fewshot: [0], icl_task_type: multiple_choice}
- {label: piqa, dataset_uri: eval/piqa.jsonl, num_fewshot: [0, 5], icl_task_type: multiple_choice, max_seq_len: 99}
"""
RUN = """
variables: {model_name_or_path: EleutherAI/gpt-neo-125m, lengths: {longest: 1024}}
max_seq_len: ${variables.lengths.longest}
models: [{model_name: '${variables.model_name_or_path}', load_path: '${NOT_SET}'}]
device_eval_batch_size: 4
icl_subset_num_batches:
eval_subset_num_batches: -1
"""
GAUNTLET = """
eval_gauntlet:
  weighting: EQUAL
  subtract_random_baseline: true
  rescale_accuracy: true
  averages: {core_average: [common, physical]}
  categories:
  - {name: common, benchmarks: [{name: copa, num_fewshot: 0, random_baseline: 0.5}]}
  - name: physical
    benchmarks: [{name: piqa, num_fewshot: 5, random_baseline: 0.5}, {name: piqa, num_fewshot: 0}]
"""


def load(folder: Path, text: str):
    path = folder / "eval.yaml"
    path.write_text(text)
    return load_suite(path)


def test_a_whole_foundry_file_loads_and_names_what_it_leaves_out(tmp_path):
    suite = load(tmp_path, RUN + TASKS + GAUNTLET)
    assert [task.max_seq_len for task in suite.icl_tasks] == [1024, 99]
    assert suite.categories == {"common": ("copa/0-shot",), "physical": ("piqa/5-shot", "piqa/0-shot")}
    assert suite.ignored == ("variables", "models", "device_eval_batch_size")


def test_tasks_and_gauntlet_are_found_from_the_folder_that_foundry_runs_in(tmp_path, monkeypatch):
    folder = tmp_path / "scripts" / "eval" / "yamls"
    folder.mkdir(parents=True)
    (folder / "tasks.yaml").write_text(TASKS)
    (folder / "gauntlet.yaml").write_text(GAUNTLET)
    text = "icl_tasks: eval/yamls/tasks.yaml\neval_gauntlet: eval/yamls/gauntlet.yaml\n"
    outside = load(folder, text)
    monkeypatch.chdir(tmp_path / "scripts")
    assert load(folder, text) == outside
    assert [task.label for task in outside.icl_tasks] == ["copa", "piqa"]
    assert list(outside.categories) == ["common", "physical"]


def test_a_list_may_mix_tasks_and_files_of_tasks(tmp_path):
    (tmp_path / "tasks.yaml").write_text(TASKS)
    own = "{label: own, dataset_uri: own.jsonl, num_fewshot: [1], icl_task_type: schema}"
    suite = load(tmp_path, f"icl_tasks:\n- tasks.yaml\n- {own}\n")
    assert [task.label for task in suite.icl_tasks] == ["copa", "piqa", "own"]


def test_a_suite_that_starts_from_another_has_its_own_name_and_overrides(tmp_path):
    suite = load(tmp_path, "base: openlm\noverrides: {copa: {num_fewshot: [0, 1]}}\n")
    assert suite.name == "eval"
    assert {task.label: task.num_fewshot for task in suite.icl_tasks}["copa"] == (0, 1)
    assert suite.headline == load_suite("openlm").headline


def test_every_task_of_the_gauntlet_has_a_random_baseline():
    baselines = read_mapping(SHIPPED.parent / "baselines" / "random_v1.yaml")["baselines"]
    centred = {name.split("/")[0] for members in load_suite("gauntlet").categories.values() for name in members}
    assert centred <= set(baselines)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("icl_subset_num_batches: 1\n" + TASKS, "icl_subset_num_batches would change"),
        ("eval_subset_num_batches: 2\n" + TASKS, "eval_subset_num_batches would change"),
        ("eval_loader: {name: text}\n" + TASKS, "eval_loader would change"),
        ("code_paths: [mine.py]\n" + TASKS, "code_paths would change"),
        ("max_seq_leng: 3\n" + TASKS, "max_seq_leng"),
        ("max_seq_len: ${a}\na: ${max_seq_len}\n" + TASKS, "refers to itself"),
        ("max_seq_len: ${variables.x}\n" + TASKS, "names nothing"),
        ("max_seq_len: ${NO_SUCH_VARIABLE}\n" + TASKS, "NO_SUCH_VARIABLE"),
        (TASKS + GAUNTLET.replace("EQUAL", "SAMPLE_SZ"), "weighting"),
        (TASKS + GAUNTLET.replace("rescale_accuracy: true", "rescale_accuracy: false"), "rescale_accuracy"),
        (TASKS + GAUNTLET.replace("[common, physical]", "[common]"), "core_average"),
        (TASKS + GAUNTLET.replace("random_baseline: 0.5", "random_baseline: 0.4"), "0.4 for copa, but version v1"),
        (TASKS + GAUNTLET.replace("piqa, num_fewshot: 5", "piqa, num_fewshot: 3"), "piqa/3-shot"),
        ("eval_gauntlet: nowhere.yaml\n" + TASKS, "nowhere.yaml, which is neither"),
        ("base: openlmm\n", "did you mean 'openlm'"),
        ("base: openlm\noverrides: [copa]\n", "overrides has not the form"),
    ],
)  # fmt: skip
def test_what_would_change_scores_unseen_is_refused(tmp_path, text, says):
    with pytest.raises(ConfigError) as e:
        load(tmp_path, text)
    assert says in str(e.value)
