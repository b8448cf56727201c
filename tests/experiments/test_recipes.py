"""Recipes: every shipped one loads; a wrong one is named with its file, field and what was probably meant."""

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from openlm_pipeline.errors import ConfigError
from openlm_pipeline.experiments import Experiment, apply_overrides, load_experiment, recipe_names, recipe_paths
from openlm_pipeline.experiments.load import SHIPPED
from openlm_pipeline.models.config import ModelConfig

RECIPE = """
name: mine
tokenizer: {name: bpe, train: {vocab_size: 300}}
seq_len: 16
sources: [{name: text, files: ["raw/*.jsonl"]}]
model: {hidden_dim: 8, n_layers: 1, n_heads: 1}
training: {global_batch: 64, lr: 1.0e-3}
milestones: [1K, 2K]
"""
Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes a recipe file: the usual one, with top-level fields replaced or added."""

    def make(path: str = "mine.yaml", text: str = RECIPE, **fields: object) -> Path:
        file = tmp_path / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(yaml.safe_dump({**yaml.safe_load(text), **fields}) if fields else text)
        return file

    return make


def error_of(path: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_experiment(str(path), overrides)
    return str(caught.value)


def shipped() -> list[str]:
    return [path.stem for path in sorted(SHIPPED.glob("*.yaml"))]


@pytest.mark.parametrize("name", shipped())
def test_every_shipped_recipe_loads(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("OPENLM_RAW_DATA", "OPENLM_TOKENIZER", "OPENLM_RECIPES"):
        monkeypatch.delenv(variable, raising=False)
    experiment = load_experiment(name)
    assert experiment.name == name and experiment.description
    assert isinstance(experiment.model_config_resolved(), ModelConfig)
    labels = [label for label, _ in experiment.labelled_milestones()]
    assert len(set(labels)) == len(experiment.milestones) >= 1
    assert Experiment(**experiment.model_dump()) == experiment


def test_the_sizes_of_open_lm_ship() -> None:
    sizes = ("11m", "25m", "87m", "160m", "411m", "830m", "1b", "3b", "7b")
    assert {f"pretrain_{size}" for size in sizes} | {"demo"} <= set(recipe_names())


@pytest.mark.parametrize(
    ("override", "path", "meant"),
    [
        ("training.learning_rate=1", "training: ", "unknown key 'learning_rate'"),
        ("training.lrr=1", "training: ", "did you mean 'lr'?"),
        ("seqlen=16", "", "did you mean 'seq_len'?"),
        ("tokenizer.trian={vocab_size: 300}", "tokenizer: ", "did you mean 'train'?"),
        ("model.hiden_dim=8", "", "did you mean 'hidden_dim'?"),
        ("xyz=1", "", "valid keys: name, version"),
    ],
)
def test_an_unknown_key_names_file_place_and_the_nearest(write: Write, override: str, path: str, meant: str) -> None:
    file = write()
    message = error_of(file, override)
    assert f"recipe {file}" in message and path in message and meant in message


def test_all_that_is_wrong_is_said_at_once(write: Write) -> None:
    message = error_of(write(), "training.lr=-1", "seq_len=2", "training.precision=fp8")
    assert all(part in message for part in ("training.lr: ", "seq_len: ", "training.precision: "))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("milestones=[2K, 1K]", "milestones must increase"),
        ("milestones=[1K, 1K]", "milestones must increase"),
        ("milestones=[32]", "first milestone 32 is less than one global batch"),
        ("milestones=[]", "milestones: "),
        ("milestones=[1.5]", "1.5 is not a number of tokens"),
        ("milestones=[1000, 1001]", "two milestones end at the same step"),
        ("training.global_batch=40", "global_batch 40 is not a multiple of seq_len 16"),
        ("training.warmup=3K", "warm-up and decay are longer than the schedule (2K tokens)"),
        ("training.lr=0", "training.lr: "),
        ("tokenizer={source: x.json}", "exactly one of 'source'"),
        ("tokenizer.train=null", "exactly one of 'source'"),
        ("name=With Space", "name: "),
        ("validation={source: {name: text, files: [x]}}", "needs its own name"),
        ("sources=[]", "sources: "),
        ("model={name: open_lm_9000b}", "there is no model 'open_lm_9000b'"),
        ("model.seq_len=8", "seq_len 16 is more than the model's 8"),
    ],
)
def test_values_that_cannot_be(write: Write, override: str, message: str) -> None:
    file = write()
    found = error_of(file, override)
    assert message in found and str(file) in found


def test_overrides_reach_any_depth(write: Write) -> None:
    experiment = load_experiment(
        str(write()), ["training.lr=0.5", "milestones=[2K, 1.5M]", "execution.micro_batch=2", "description=a=b"]
    )
    assert experiment.training.lr == 0.5 and experiment.training.global_batch == 64
    assert experiment.milestones == (2000, 1_500_000)
    assert experiment.execution.micro_batch == 2 and experiment.description == "a=b"


@pytest.mark.parametrize("override", ["training.lr", "=1", "lr"])
def test_an_override_of_no_form_is_refused(override: str) -> None:
    with pytest.raises(ConfigError, match=r"is not an override of the form key=value"):
        apply_overrides({}, [override])


def test_an_override_of_bad_yaml_names_its_key(write: Write) -> None:
    assert "the value of milestones is not valid YAML" in error_of(write(), "milestones=[1K")


def test_overrides_leave_the_document_as_it_was() -> None:
    document = {"training": {"lr": 1}}
    assert apply_overrides(document, ["training.lr=2", "training.eps=3"]) == {"training": {"lr": 2, "eps": 3}}
    assert document == {"training": {"lr": 1}}


def test_variables(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(sources=[{"name": "text", "files": ["${DATA_FOLDER}/${PART:-00}.jsonl"]}])
    monkeypatch.delenv("DATA_FOLDER", raising=False)
    message = error_of(file)
    assert str(file) in message and "${DATA_FOLDER}, which is not set" in message
    monkeypatch.setenv("DATA_FOLDER", "s3://bucket")
    assert load_experiment(str(file)).sources[0].files == ("s3://bucket/00.jsonl",)
    monkeypatch.setenv("PART", "07")
    assert load_experiment(str(file)).sources[0].files == ("s3://bucket/07.jsonl",)
    monkeypatch.setenv("PART", "")
    assert load_experiment(str(file)).sources[0].files == ("s3://bucket/00.jsonl",)


def test_extends_merges_and_the_nearer_wins(write: Write) -> None:
    write("bases/far.yaml", "training: {eps: 1.0e-5, lr: 9}\nversion: far")
    write("bases/near.yaml", "extends: far.yaml\ntraining: {lr: 8}\nversion: near")
    experiment = load_experiment(str(write(extends="bases/near.yaml")))
    assert experiment.version == "near"
    assert (experiment.training.lr, experiment.training.eps) == (1e-3, 1e-5)


@pytest.mark.parametrize("circle", [("mine.yaml",), ("b.yaml", "mine.yaml"), ("b.yaml", "bases/../b.yaml")])
def test_a_circle_of_extends_is_named(write: Write, circle: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(extends=circle[0])
    (file.parent / "bases").mkdir()
    if len(circle) > 1:
        write("b.yaml", f"extends: {circle[1]}")
    assert "extend each other in a circle" in error_of(file)
    monkeypatch.chdir(file.parent)
    assert "extend each other in a circle" in error_of(Path("mine.yaml"))


def test_extends_of_nothing_names_the_missing_file(write: Write) -> None:
    file = write(extends="nowhere.yaml")
    assert f"there is no file {file.parent / 'nowhere.yaml'}" in error_of(file)


@pytest.mark.parametrize(
    ("text", "message"), [("a: [", "is not valid YAML"), ("- a", "is not a YAML mapping"), ("", "is not")]
)
def test_a_file_that_is_no_recipe(write: Write, text: str, message: str) -> None:
    file = write(text=text)
    assert message in error_of(file) and str(file) in error_of(file)


def test_an_unknown_recipe_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"there is no recipe 'pretrain_1bb'; did you mean 'pretrain_1b'\?"):
        load_experiment("pretrain_1bb")
    with pytest.raises(ConfigError, match=r"there is no recipe 'zzz'; known: dclm_1b_1x, "):
        load_experiment("zzz")
    with pytest.raises(ConfigError, match=r"there is no recipe file nowhere\.yaml"):
        load_experiment("nowhere.yaml")


def test_folders_of_openlm_recipes(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = write("one/mine.yaml"), write("two/yours.yaml", name="yours")
    monkeypatch.setenv("OPENLM_RECIPES", f"{one.parent}:{two.parent}")
    assert recipe_paths()["mine"] == one and {"mine", "yours", "demo"} <= set(recipe_names())
    assert load_experiment("yours").name == "yours"


def test_a_recipe_of_yours_takes_the_place_of_a_shipped_one_that_it_extends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shipped_milestones = load_experiment("demo").milestones
    (tmp_path / "demo.yaml").write_text("extends: demo\nmilestones: [300K]\n")
    (tmp_path / "other.yaml").write_text("extends: demo\nname: other\ntraining: {lr: 1.0e-4}\n")
    (tmp_path / "round.yaml").write_text("extends: trip\n")
    (tmp_path / "trip.yaml").write_text("extends: round\n")
    monkeypatch.setenv("OPENLM_RECIPES", str(tmp_path))
    assert shipped_milestones != (300_000,)
    assert load_experiment("demo").milestones == load_experiment("other").milestones == (300_000,)
    assert load_experiment("other").training.warmup == load_experiment("demo").training.warmup == 40_000
    with pytest.raises(ConfigError, match="extend each other in a circle"):
        load_experiment("round")


def test_a_recipe_of_a_folder_has_its_files_name(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write("folder/other.yaml")
    assert load_experiment(str(file)).name == "mine"  # a file given by path may have any name
    monkeypatch.setenv("OPENLM_RECIPES", str(file.parent))
    with pytest.raises(ConfigError, match=r"is named 'mine'; a recipe's name is its file's name"):
        load_experiment("other")


def test_datasets_of_an_experiment(write: Write) -> None:
    validation = {"source": {"name": "held_out", "files": ["x"]}}
    experiment = load_experiment(str(write(validation=validation)))
    assert [d.name for d in experiment.datasets()] == ["text", "held_out"]
    assert [d.name for d in experiment.training_datasets()] == ["text"]
    assert [d.name for d in experiment.validation_datasets()] == ["held_out"]
    assert experiment.model_config_resolved().vocab_size == 300 and experiment.model_config_resolved().seq_len == 16


def test_experiments_are_frozen(write: Write) -> None:
    experiment = load_experiment(str(write()))
    with pytest.raises(ValueError, match="frozen"):
        experiment.seed = 3
