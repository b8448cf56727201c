"""The reference of keys and the schema for editors are what the models read."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from commands import openlm
from jsonschema import Draft202012Validator
from recipe_reference import page, schema

from openlm_pipeline.experiments.load import SHIPPED

REPOSITORY = Path(__file__).parents[2]
GOOD = """
name: ${NAME}
tokenizer: {name: bpe, train: {vocab_size: "${VOCABULARY:-300}"}}
seq_len: 16
sources: [{name: text, files: ["raw/*.jsonl"]}]
model: {hidden_dim: 8, n_layers: 1, n_heads: 1}
training: {global_batch: 64K, lr: 1e-3, horizon: 2000000, schedule: "${SCHEDULE}"}
milestones: [250B, 1.5T, 2_000_000_000_000]
launcher: {kind: slurm, slurm: {partition: gpu}}
"""


@pytest.fixture(scope="module")
def editor() -> Draft202012Validator:
    """What an editor checks a recipe with: the schema that `openlm recipes --schema` prints."""
    printed = json.loads(openlm("recipes", "--schema", variables={}).stdout)
    Draft202012Validator.check_schema(printed)
    return Draft202012Validator(printed)


@pytest.mark.parametrize(
    ("path", "made"), [("docs/reference.md", page), ("openlm_pipeline/experiments/recipe.schema.json", schema)]
)
def test_what_is_committed_is_what_the_models_say(path: str, made: Any, tmp_path: Path) -> None:
    now = tmp_path / Path(path).name
    now.write_text(made())
    assert (REPOSITORY / path).read_text() == now.read_text(), f"If it is meant: cp {now} {REPOSITORY / path}"


@pytest.mark.parametrize("path", sorted(SHIPPED.glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_recipes_fit_the_schema(path: Path, editor: Draft202012Validator) -> None:
    assert [e.message for e in editor.iter_errors(yaml.safe_load(path.read_text()))] == []


@pytest.mark.parametrize(
    "text",
    [
        GOOD,
        "extends: demo\nname: mine\ntraining: {lr: 2e-3}",
        "extends: demo\nname: mine\nsources: {'0': {name: other}}",
        "extends: ../base.yaml\nmodel: {name: open_lm_1b, qk_norm: true}\nvalidation: null",
        "extends: demo\ntraining: {warmup: 1.5M, grad_clip: null}\nexecution: {compile: '${C:-no}'}",
    ],
)
def test_what_recipes_may_have_fits(text: str, editor: Draft202012Validator) -> None:
    assert [e.message for e in editor.iter_errors(yaml.safe_load(text))] == []


@pytest.mark.parametrize(
    "wrong",
    [
        "training: {lrr: 1}",
        "trainning: {lr: 1}",
        "training: {schedule: cosin}",
        "training: {lr: -1}",
        "training: {global_batch: 64KB}",
        "milestones: [250X]",
        "milestones: 250B",
        "name: Mine",
        "model: {name: open_lm_1bb}",
        "model: {hiden_dim: 8}",
        "launcher: {slurm: {partitions: gpu}}",
        "launcher: {slrm: {partition: gpu}}",
        "sources: {first: {name: x}}",
        "execution: {compile: maybe}",
    ],
)
def test_what_they_may_not_does_not(wrong: str, editor: Draft202012Validator) -> None:
    assert list(editor.iter_errors({"extends": "demo", **yaml.safe_load(wrong)}))


def test_without_extends_a_recipe_is_whole(editor: Draft202012Validator) -> None:
    assert list(editor.iter_errors({"name": "mine"}))
    assert not list(editor.iter_errors({"name": "mine", "extends": "demo"}))
