"""A recipe that does not load leaves the others alone, and its error names file, line and what was probably meant."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from openlm_pipeline.cli.main import app
from openlm_pipeline.errors import ConfigError
from openlm_pipeline.experiments import load_experiment, recipe_names
from openlm_pipeline.pipeline.recipes import RESERVED, load_recipes

GOOD = """\
name: good
tokenizer: {name: bpe, train: {vocab_size: 300}}
seq_len: 16
sources: [{name: text, files: ["raw/*.jsonl"]}]
model: {hidden_dim: 8, n_layers: 1, n_heads: 1}
training: {global_batch: 64, lr: 1.0e-3}
milestones: [1K, 2K]
"""
BOMB = "a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 12))
SUITE = """\
icl_tasks:
  - label: a
    dataset_uri: x.jsonl
    num_fewshots: [0]
    icl_task_type: multiple_choice
  - {label: b, dataset_uri: b.jsonl, num_fewshot: [0], icl_task_type: multiple_choice}
"""
EXTENDS = "extends: good\nname: bad\n"

Kinds = tuple[bytes | str, tuple[str, ...]]
KINDS: dict[str, Kinds] = {
    "unknown key": (
        EXTENDS + "trainning: {lr: 1}\n",
        ("unknown key 'trainning'; did you mean 'training'?", "bad.yaml:3"),
    ),
    "unknown key inside": (EXTENDS + "training:\n  eps: 1\n  lrr: 2\n", ("did you mean 'lr'?", "bad.yaml:5")),
    "unknown key of the model": (EXTENDS + "\nmodel:\n  hiden_dim: 2\n", ("did you mean 'hidden_dim'?", "bad.yaml:5")),
    "unknown model": (EXTENDS + "model:\n  name: open_lm_1bb\n", ("did you mean 'open_lm_1b'?", "bad.yaml:4")),
    "unknown choice": (EXTENDS + "training:\n  optimizer: mouon\n", ("did you mean 'muon'?", "bad.yaml:4")),
    "bad value": (EXTENDS + "training:\n  lr: -1\n", ("training.lr: ", "bad.yaml:4")),
    "milestones that fall": (EXTENDS + "milestones: [2K, 1K]\n", ("milestones must increase", "bad.yaml:3")),
    "unknown suite": (EXTENDS + "evaluation:\n  suite: opnlm\n", ("did you mean 'openlm'?", "bad.yaml:4")),
    "missing suite": (
        EXTENDS + "evaluation:\n  suite: no/s.yaml\n",
        ("there is no suite file no/s.yaml", "bad.yaml:4"),
    ),
    "wrong suite": (
        EXTENDS + "evaluation:\n  suite: ${FOLDER}/suite.yml\n",
        ("did you mean 'num_fewshot'?", "suite.yml:4", "bad.yaml:4"),
    ),
    "not YAML": ("name: bad\na: [\nb: 2\n", ("is not valid YAML", "bad.yaml:4")),
    "not a mapping": ("- a\n", ("bad.yaml is not a YAML mapping",)),
    "empty": ("", ("bad.yaml is not a YAML mapping",)),
    "no date": ("name: 2020-13-45\n", ("bad.yaml is not valid YAML: month must be",)),
    "invalid UTF-8": (b"name: caf\xe9\n", ("bad.yaml is not valid YAML: 'utf-8'",)),
    "a bomb of aliases": (BOMB, ("bad.yaml: its aliases stand for more than",)),
    "an alias of itself": ("name: bad\nmodel: &m {a: *m}\n", ("bad.yaml: its aliases stand for more than",)),
    "nested without end": ("name: bad\nmodel: " + "[" * 5000, ("bad.yaml is not valid YAML",)),
    "unset variable": (
        EXTENDS + 'description: "${NO_SUCH}"\n',
        ("variable ${NO_SUCH}, which is not set", "bad.yaml:3"),
    ),
    "extends itself": ("name: bad\nextends: bad.yaml\n", ("extend each other in a circle", "bad.yaml:2")),
    "extends nothing": ("name: bad\nextends: goood\n", ("did you mean 'good'?", "bad.yaml:2")),
    "another name": ("extends: good\nname: other\n", ("is named 'other'; a recipe's name is its file's", "bad.yaml:2")),
    "upper-case letters": ("extends: good\nname: Bad\n", ("name: String should match pattern", "bad.yaml:2")),
    "keys that are numbers": (EXTENDS + "1: 2\n", ("unknown key 1",)),
    "a list as a mapping": (EXTENDS + "training: [1]\n", ("training: ", "bad.yaml:3")),
    "another dataset": (
        EXTENDS + "sources: [{name: text, files: [else]}]\n",
        ("recipe good and recipe bad mean different things by dataset text;", "sources.0.name=NAME"),
    ),
    "another tokenizer": (
        EXTENDS + "tokenizer: {train: {vocab_size: 400}}\nsources: {0: {name: text_400}}\n",
        ("mean different things by tokenizer bpe;", "tokenizer.name=NAME"),
    ),
    "another baseline": (
        EXTENDS + "evaluation: {suite: openlm, baselines: [{name: pythia, model: b}]}\n",
        (
            "recipe scored and recipe bad mean different things by baseline pythia",
            "evaluation.baselines.0.name=NAME",
        ),
    ),
}
Isolated = Callable[[str], Path]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of recipes that is looked into, in which two are good."""
    made = tmp_path / "recipes"
    made.mkdir()
    for name, value in {"OPENLM_HOME": tmp_path / "home", "OPENLM_RECIPES": made, "FOLDER": made}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.delenv("NO_SUCH", raising=False)
    scored = "extends: good\nname: scored\nevaluation: {suite: openlm, baselines: [{name: pythia, model: a}]}\n"
    (made / "good.yaml").write_text(GOOD)
    (made / "scored.yaml").write_text(scored)
    (made / "suite.yml").write_text(SUITE)
    return made


def put(folder: Path, name: str, content: bytes | str) -> Path:
    path = folder / f"{name}.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize("kind", KINDS)
def test_a_bad_recipe_isolates_itself(kind: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content, said = KINDS[kind]
    before = {e.name: e for e in load_recipes()[0]}
    bad = put(folder, "bad", content)
    loaded, not_loaded = load_recipes()
    assert {e.name: e for e in loaded} == before and "good" in before and "demo" in before
    assert list(not_loaded) == ["bad"]
    assert all(part in not_loaded["bad"] for part in said), not_loaded
    assert "bad" in not_loaded["bad"] and (
        str(bad) in not_loaded["bad"] or "mean different things" in not_loaded["bad"]
    )


@pytest.mark.parametrize("kind", KINDS)
def test_commands_name_it(kind: str, folder: Path) -> None:
    """`openlm recipes` lists it; a command that it is named to ends with its error and exit code 2."""
    content, said = KINDS[kind]
    put(folder, "bad", content)
    listed = CliRunner().invoke(app, ["recipes"])
    assert listed.exit_code == 0 and "not loaded: bad: " in listed.output and "good" in listed.output
    refused = CliRunner().invoke(app, ["launch", "bad", "--dry-run"])
    assert isinstance(refused.exception, ConfigError) and refused.exception.exit_code == 2
    assert said[0] in str(refused.exception)
    assert CliRunner().invoke(app, ["launch", "good", "--dry-run"]).exit_code == 0


def test_a_line_is_named_in_the_file_that_has_it(folder: Path) -> None:
    base = put(folder, "base", "extends: good\nname: base\ntraining:\n  beta1: 7\n")
    put(folder, "top", "extends: base\nname: top\ndescription: above\n")
    errors = load_recipes()[1]
    assert set(errors) == {"base", "top"}
    assert all(f"training.beta1: Input should be less than 1 ({base}:4)" in error for error in errors.values())
    put(folder, "base", "extends: good\nname: base\ntraining: [\n")
    assert f"{base} is not valid YAML" in load_recipes()[1]["top"]


def test_each_error_of_several_has_its_line(folder: Path) -> None:
    path = put(folder, "bad", EXTENDS + "training:\n  lr: -1\n  beta1: 7\nseq_len: 1\n")
    lines = load_recipes()[1]["bad"].splitlines()[1:]
    assert [line.rpartition(" (")[2] for line in lines] == [f"{path}:6)", f"{path}:4)", f"{path}:5)"]


@pytest.mark.parametrize(
    ("override", "meant"), [("training.lrr=1", "'lr'"), ("training={lrr: 1}", "'lr'"), ("modle.name=x", "'model'")]
)
def test_an_override_is_named_as_it_was_given(folder: Path, override: str, meant: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_experiment("good", ["training.eps=1e-7", override])
    assert f"did you mean {meant}?" in str(caught.value) and f"(override {override})" in str(caught.value)


def test_what_cannot_be_read(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "directory.yaml").mkdir()
    (folder / "dangling.yaml").symlink_to(tmp_path / "nowhere")
    put(folder, "closed", GOOD).chmod(0)
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    monkeypatch.setenv("OPENLM_RECIPES", f"{folder}:{tmp_path / 'none'}:{loop}")
    loaded, errors = load_recipes()
    assert "good" in [e.name for e in loaded]
    assert "directory.yaml can't be read: Is a directory" in errors["directory"]
    assert "there is no file" in errors["dangling"]
    for path in (tmp_path / "none", loop):
        assert errors[str(path)] == f"OPENLM_RECIPES names {path}, which is not a folder to read"
    with pytest.raises(
        ConfigError, match="there is no recipe 'mine'.*OPENLM_RECIPES names .*none, which is not a fold"
    ):
        load_experiment("mine")
    if os.geteuid():  # root reads everything
        assert "closed.yaml can't be read: Permission denied" in errors["closed"]


def test_the_first_of_two_files_of_one_name_counts(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    later = put(other, "good", GOOD + "description: the later one\n")
    monkeypatch.setenv("OPENLM_RECIPES", f"{folder}:{folder}:{other}")
    loaded, errors = load_recipes()
    assert [e.description for e in loaded if e.name == "good"] == [""]
    assert errors == {str(later): f"two recipes are named good: {folder / 'good.yaml'}, which is used, and {later}"}


def test_of_two_that_disagree_the_one_written_later_is_left_out(folder: Path) -> None:
    """Whatever their names, so that a new recipe leaves alone what there is."""
    put(folder, "a_newer", "extends: good\nname: a_newer\nsources: [{name: text, files: [else]}]\n")
    assert list(load_recipes()[1]) == ["a_newer"]
    os.utime(folder / "a_newer.yaml", (0, 0))
    assert list(load_recipes()[1]) == ["good", "scored"]


def test_a_recipe_in_the_place_of_a_shipped_one_disagrees_with_the_shipped(folder: Path) -> None:
    """Whatever the order of their names."""
    put(folder, "dclm_1b_1x", "extends: dclm_1b_1x\nseq_len: 1024\n")
    loaded, errors = load_recipes()
    assert list(errors) == ["dclm_1b_1x"] and {"dclm_3b_1x", "dclm_7b_1x"} <= {e.name for e in loaded}


@pytest.mark.parametrize(
    "name", ["evaluate_demo", "demo_checkpoints", "tokenize_pile", "derive", "train_demo", "input", "lambda", "a__b"]
)
def test_a_name_that_the_graph_needs_is_refused(folder: Path, name: str) -> None:
    put(folder, name, f"extends: good\nname: {name}\n")
    loaded, errors = load_recipes()
    assert list(errors) == [name] and {"demo", "good"} <= {e.name for e in loaded}


def test_all_names_that_dagster_refuses_are_reserved() -> None:
    from dagster._core.definitions.utils import DISALLOWED_NAMES  # no public name

    assert DISALLOWED_NAMES <= RESERVED


def test_patterns_choose_recipes(folder: Path) -> None:
    loaded, errors = load_recipes(["demo", "pretrain_1*"])
    assert {e.name for e in loaded} == {"demo", "pretrain_11m", "pretrain_160m", "pretrain_1b"} and not errors
    loaded, errors = load_recipes(["good", "dmo"])
    assert [e.name for e in loaded] == ["good"]
    assert errors == {"dmo": "there is no recipe 'dmo'; did you mean 'demo'?"}


def test_aliases_and_indices_are_for_use(folder: Path) -> None:
    """What is refused in a bomb is fine in a recipe; a list's item is changed by its number."""
    document = yaml.safe_load(GOOD)
    put(folder, "more", GOOD.replace("good", "more").replace("[{name: text,", "[&s {name: text,"))
    put(folder, "renamed", "extends: good\nname: renamed\nsources: {0: {name: other}}\n")
    assert load_experiment("renamed").sources[0].files == tuple(document["sources"][0]["files"])
    changed = load_experiment("good", ["sources.0.name=new", "sources.0.weight=2"]).sources
    assert (changed[0].name, changed[0].weight, len(changed)) == ("new", 2, 1)
    with pytest.raises(ConfigError, match=r"sources: .*\(override sources.1.name=x\)"):
        load_experiment("good", ["sources.1.name=x"])
    assert "more" in recipe_names()
