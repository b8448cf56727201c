"""`openlm evaluate` as people use it: any model with OpenLM's arguments, and the milestones of a recipe."""

import html
import json
import re
import shutil
from dataclasses import dataclass

import pyarrow.parquet as pq
import pytest
import yaml
from gloo_workers import forked_scorers
from typer.testing import CliRunner

from openlm_pipeline.cli.main import app
from openlm_pipeline.errors import OpenLMError
from openlm_pipeline.experiments import load_experiment


@pytest.fixture(scope="module")
def exported(finished, tmp_path_factory):
    """The tiny run's last milestone in OpenLM's files and as a Hugging Face folder, and its suite by itself."""
    root = tmp_path_factory.mktemp("exported")
    pipeline = finished.copy(root)
    newest = sorted((pipeline.run_folder / "checkpoints").glob("step-*"))[-1]
    tokenizer = pipeline.home / "tokenizers" / "tiny_bpe"
    from openlm_pipeline.checkpoints.model_export import export_huggingface, export_openlm

    export_openlm(newest, root / "logs")
    export_huggingface(newest, root / "hf", tokenizer)
    return pipeline, root, tokenizer


@dataclass
class Ended:
    """How a command ended."""

    returncode: int
    stdout: str
    stderr: str


def openlm(pipeline, *arguments: str) -> Ended:
    """The command in this process: starting another one takes seconds."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in pipeline.variables.items():
            patch.setenv(name, value)
        result = CliRunner().invoke(app, list(arguments))
    error = result.exception
    if isinstance(error, OpenLMError):
        return Ended(error.exit_code, result.stdout, f"error: {error}")
    assert error is None or isinstance(error, SystemExit), error
    return Ended(result.exit_code, result.stdout, result.stderr)


def metrics(result: Ended) -> dict[str, str]:
    assert result.returncode == 0, result.stderr
    return dict(line.split(": ") for line in result.stdout.splitlines() if line.startswith("metrics/"))


def test_one_model_gives_the_same_scores_in_all_its_forms(exported, tmp_path):
    pipeline, root, tokenizer = exported
    suite = str(pipeline.home / "suite.yaml")
    step = str(sorted((pipeline.run_folder / "checkpoints").glob("step-*"))[-1])
    openlms = ("--checkpoint", str(root / "logs" / "checkpoints" / "epoch_1.pt"), "--tokenizer", str(tokenizer))
    named = openlm(
        pipeline, "evaluate", *openlms, "--model-config", str(root / "logs" / "model.json"), "--eval-yaml", suite,
        "--output-dir", str(tmp_path / "pt"),
    )  # fmt: skip
    scores = metrics(named)
    assert "Ran eval in: " in named.stdout
    assert scores == {
        "metrics/last_word/0-shot/InContextLearningLMAccuracy": scores[
            "metrics/last_word/0-shot/InContextLearningLMAccuracy"
        ],
        "metrics/choice/1-shot/InContextLearningMultipleChoiceAccuracy": scores[
            "metrics/choice/1-shot/InContextLearningMultipleChoiceAccuracy"
        ],
    }
    folder = openlm(pipeline, "evaluate", "--checkpoint", str(root / "hf"), "--eval-yaml", suite, "--name", "as_hf")
    ours = openlm(pipeline, "evaluate", "--checkpoint", step, "--eval-yaml", suite)  # with the run's own tokenizer
    assert metrics(folder) == metrics(ours) == scores
    of_run = json.loads((pipeline.home / "scorecards/tiny/v1/t0040K/scorecard.json").read_text())
    assert [str(t["accuracy"]) for t in of_run["tasks"]] == list(scores.values())
    written = json.loads((tmp_path / "pt" / "results.json").read_text())
    assert {k: str(v) for k, v in written["metrics"].items()} == scores
    items = pq.read_table(tmp_path / "pt" / "items.parquet")
    assert items["milestone"].null_count == items.num_rows > 0
    assert (pipeline.home / "scorecards/models/as_hf/tiny/scorecard.json").exists()
    again = openlm(pipeline, "evaluate", "--checkpoint", str(root / "hf"), "--eval-yaml", suite, "--name", "as_hf")
    assert "already scored" in again.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        ([], 2, "give a recipe, or --checkpoint"),
        (["tiny", "--checkpoint", "x"], 2, "give a recipe, or --checkpoint"),
        (["--checkpoint", "/nowhere.pt"], 3, "there is no checkpoint /nowhere.pt"),
        (["--checkpoint", "{hf}", "--eval-yaml", "{missing}"], 3, "which does not exist"),
        (["--checkpoint", "{hf}", "--eval-yaml", "{broken}"], 4, "broken.jsonl, line 2"),
        (["--checkpoint", "{hf}", "--eval-yaml", "opnlm"], 2, "did you mean 'openlm'"),
        (["--checkpoint", "{hf}", "--tokenizer", "{far}"], 2, "may give the id 70000, and the embedding of"),
        (["--checkpoint", "{hf}", "--tokenizer", "{random}"], 2, "has dropout 0.5"),
        (["tiny", "--baseline", "x"], 2, "has no baseline x"),
        (["tiny", "--milestone", "7B"], 2, "has no milestone 7B"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_scored(exported, tmp_path, arguments, code, says):
    pipeline, root, _ = exported
    row = {"label": "t", "num_fewshot": [0], "icl_task_type": "language_modeling"}
    (tmp_path / "broken.jsonl").write_text('{"context": "a", "continuation": "b"}\n{"context": 1}\n')
    names = {"hf": root / "hf"}
    for name in ("missing", "broken"):
        task = {**row, "dataset_uri": str(tmp_path / f"{name}.jsonl")}
        names[name] = tmp_path / f"{name}.yaml"
        names[name].write_text(yaml.safe_dump({"icl_tasks": [task]}))
    tokenizer = json.loads((root / "hf" / "tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    models = {"far": {"vocab": {**vocab, max(vocab, key=vocab.get): 70_000}}, "random": {"dropout": 0.5}}
    for name, changes in models.items():
        names[name] = tmp_path / f"{name}.json"
        names[name].write_text(json.dumps({**tokenizer, "model": {**tokenizer["model"], **changes}}))
    result = openlm(pipeline, "evaluate", *(a.format(**names) for a in arguments))
    assert result.returncode == code, result.stderr
    assert says in result.stderr
    assert "requests" not in result.stdout


def test_a_task_with_categories_is_printed_category_by_category(exported, tmp_path):
    pipeline, root, _ = exported
    rows = [{"context": f"import {c}", "continuation": "os", "category": c} for c in "bbac"]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {"label": "t", "num_fewshot": [0], "icl_task_type": "language_modeling", "has_categories": True}
    suite = tmp_path / "suite.yaml"
    suite.write_text(yaml.safe_dump({"icl_tasks": [{**task, "dataset_uri": str(tmp_path / "rows.jsonl")}]}))
    printed = metrics(openlm(pipeline, "evaluate", "--checkpoint", str(root / "hf"), "--eval-yaml", str(suite)))
    assert list(printed) == [f"metrics/t/0-shot/{c}/InContextLearningLMAccuracy" for c in "abc"]


def test_two_processes_and_a_baseline_for_a_recipe(exported, tmp_path):
    pipeline, root, _ = exported
    pipeline = pipeline.copy(tmp_path / "pipeline")
    shutil.rmtree(pipeline.home / "scorecards")
    recipe = yaml.safe_load((pipeline.root / "recipes" / "tiny.yaml").read_text())
    recipe["milestones"] = recipe["milestones"][:1]
    recipe["evaluation"] |= {
        "processes": 2,
        "baselines": [{"name": "copy", "model": str(root / "hf")}],
        "quoted": ["opt_1_3b"],
    }
    (pipeline.root / "recipes" / "tiny.yaml").write_text(yaml.safe_dump(recipe))
    with forked_scorers():
        made = openlm(pipeline, "evaluate", "tiny")
    assert made.returncode == 0, made.stderr + made.stdout
    alone = openlm(pipeline, "evaluate", "tiny", "evaluation.processes=1")
    assert alone.returncode == 0, alone.stderr
    assert "items already scored" in alone.stdout
    assert openlm(pipeline, "report", "tiny", "--model-card", str(tmp_path / "README.md")).returncode == 0
    page = (pipeline.home / "reports/tiny/v1/report.md").read_text()
    assert "copy" in page
    assert "re-run" in page
    assert "model-index:" in (tmp_path / "README.md").read_text()


def test_a_number_is_shown_only_for_what_it_was_measured_on(exported, tmp_path):
    """A baseline whose model is another now, and a milestone scored in another precision or suite, have no numbers."""
    pipeline, root, _ = exported
    pipeline = pipeline.copy(tmp_path / "pipeline")
    for name in ("first", "second"):
        shutil.copytree(root / "hf", tmp_path / name)
    recipe = pipeline.root / "recipes" / "tiny.yaml"

    def report(precision: str = "fp32", model: str = "first", **fields) -> str:
        document = yaml.safe_load(recipe.read_text())
        document["evaluation"] |= {"precision": precision, "baselines": [{"name": "other", "model": model, **fields}]}
        recipe.write_text(yaml.safe_dump(document))
        made = openlm(pipeline, "report", "tiny")
        assert made.returncode == 0, made.stderr
        return html.unescape((pipeline.home / "reports/tiny/v1/report.md").read_text())

    def row(page: str, name: str) -> list[str]:
        line, *_ = (line for line in page.splitlines() if line.startswith(f"| {name} |"))
        return [cell.strip() for cell in line.strip("|").split("|")[1:]]

    first, second = str(tmp_path / "first"), str(tmp_path / "second")
    assert set(row(report(model=first), "other (re-run)")) == {"not run"}
    assert openlm(pipeline, "evaluate", "tiny", "--baseline", "other").returncode == 0
    scored = row(report(model=first), "other (re-run)")
    assert "not run" not in scored[0] and float(scored[0].split()[0]) > 0
    page = report(model=second)
    assert set(row(page, "other (re-run)")) == {"not run"}
    assert f"model {first} -> {second}" in page
    (tmp_path / "first" / "config.json").touch()
    assert "its files were changed since" in report(model=first)
    again = openlm(pipeline, "evaluate", "tiny", "--baseline", "other")
    assert "items already scored" in again.stdout  # by their hash the weights are the same
    assert row(report(model=first), "other (re-run)") == scored
    page = report(precision="bf16", model=first)
    assert set(row(page, "other (re-run)")) == {"not run"}
    milestones = [line for line in page.splitlines() if "| stale |" in line]
    assert milestones and "its scorecard is of something else (weights " in page
    assert openlm(pipeline, "evaluate", "tiny", "--baseline", "other").returncode == 0
    page = report(precision="bf16", model=first)
    assert "- Precision: bf16" not in page  # no milestone was scored in it
    assert float(row(page, "other (re-run)")[0].split()[0]) > 0


def test_a_part_of_a_suite_says_so_and_leaves_the_whole_alone(exported, tmp_path):
    pipeline, _, _ = exported
    pipeline = pipeline.copy(tmp_path / "pipeline")
    whole = pipeline.home / "scorecards/tiny/v1/t0040K"
    before = {p: p.read_bytes() for p in whole.rglob("*") if p.is_file()}
    part = ("--tasks", "choice", "--limit", "7", "--device", "cpu", "--batch-tokens", "64")
    done = openlm(pipeline, "evaluate", "tiny", "--milestone", "40K", *part)
    assert done.returncode == 0, done.stderr
    rows = len((pipeline.home / "raw/tasks/choice.jsonl").read_text().splitlines())
    assert f"7 of its {rows} rows alone were scored" in done.stdout
    assert "scorecard tiny t0040K made: 1_of_2_tasks" in done.stdout
    assert {p: p.read_bytes() for p in before} == before
    folder = whole / "parts" / "choice-7_rows"
    card = json.loads((folder / "scorecard.json").read_text())
    assert [(t["task"], t["num_items"], t["num_rows"]) for t in card["tasks"]] == [("choice", 7, rows)]
    some, all_rows = (pq.read_table(f / "items.parquet").to_pylist() for f in (folder, whole))
    by_key = {(r["task"], r["num_fewshot"], r["item"]): r["prompt_hash"] for r in all_rows}
    assert all(by_key[r["task"], r["num_fewshot"], r["item"]] == r["prompt_hash"] for r in some)
    again = openlm(pipeline, "evaluate", "tiny", "--milestone", "10K", *part)
    assert again.returncode == 0
    for wrong, says in (("--tasks=lst_word", "did you mean 'last_word'"), ("--device=gpu9", "--device gpu9")):
        refused = openlm(pipeline, "evaluate", "tiny", "--milestone", "40K", wrong)
        assert refused.returncode == 2 and says in refused.stderr


def test_models_of_equal_names_do_not_take_each_others_scores(exported, tmp_path):
    pipeline, root, _ = exported
    pipeline = pipeline.copy(tmp_path / "pipeline")
    models = [tmp_path / place / "Llama-3.2-1B" for place in ("a", "b")] + [tmp_path / "a" / "Llama-3.2-3B"]
    for model in models:
        shutil.copytree(root / "hf", model)
    scores = pipeline.home / "scorecards" / "models"
    before = set(scores.glob("*"))
    suite = ("--eval-yaml", str(pipeline.home / "suite.yaml"))
    for model in [*models, models[0]]:
        assert openlm(pipeline, "evaluate", "--checkpoint", str(model), *suite).returncode == 0
    names = sorted(p.name for p in set(scores.iterdir()) - before)
    assert [n[:14] for n in names] == ["a_llama_3_2_1b", "a_llama_3_2_3b", "b_llama_3_2_1b"]
    twin = tmp_path / "more" / "a" / "Llama-3.2-1B"
    shutil.copytree(root / "hf", twin)
    assert openlm(pipeline, "evaluate", "--checkpoint", str(twin), *suite).returncode == 0
    (apart,) = {p.name for p in scores.iterdir()} - {*names, *(p.name for p in before)}
    assert re.fullmatch("a_llama_3_2_1b_[0-9a-f]{8}", apart)
    named = openlm(pipeline, "evaluate", "--checkpoint", str(twin), *suite, "--name", names[0])
    assert f"the scores of {models[0]} in" in named.stdout and "superseded-1" in named.stdout
    outside = openlm(pipeline, "evaluate", "--checkpoint", str(twin), *suite, "--name", "../x")
    assert outside.returncode == 2 and "letters, digits" in outside.stderr


def test_marked_blocks_are_filled_and_drift_is_noticed(exported, tmp_path):
    pipeline, _, _ = exported
    page = tmp_path / "page.md"
    blocks = ("tiny", "quoted openlm_7b")
    page.write_text("".join(f"<!-- openlm:begin {b} -->\n<!-- openlm:end {b} -->\n" for b in blocks))
    assert openlm(pipeline, "report", "--check", str(page)).returncode == 4
    assert openlm(pipeline, "report", "--update", str(page)).returncode == 0
    assert openlm(pipeline, "report", "--check", str(page)).returncode == 0
    text = page.read_text()
    assert "choice" in text
    assert "0.60*" in text
    page.write_text(text.replace("0.60*", "0.61"))
    drifted = openlm(pipeline, "report", "--check", str(page))
    assert drifted.returncode == 4
    assert "quoted openlm_7b" in drifted.stderr


def test_an_average_of_the_weights_is_scored_only_if_the_run_keeps_it(exported):
    pipeline, _, _ = exported
    with pytest.MonkeyPatch.context() as patch:
        for name, value in pipeline.variables.items():
            patch.setenv(name, value)
        with pytest.raises(Exception, match="not one of training.averages"):
            load_experiment("tiny", ["evaluation.average=ema_0.9_10"])
        kept = load_experiment("tiny", ["evaluation.average=ema_0.9_10", "training.averages=[ema_0.9_10]"])
    assert kept.evaluation.average == "ema_0.9_10"
