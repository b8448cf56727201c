"""A recipe with settings changed becomes a recipe of its own, which extends the first; nothing wrong is saved."""

from pathlib import Path

import pytest
import yaml
from commands import Ended, openlm

from openlm_pipeline.errors import ConfigError
from openlm_pipeline.experiments import load_experiment, recipe_names
from openlm_pipeline.pipeline.new_recipe import derive
from openlm_pipeline.pipeline.recipes import load_recipes


@pytest.fixture
def saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where derived recipes are saved."""
    monkeypatch.setenv("OPENLM_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("OPENLM_RECIPES", raising=False)
    return tmp_path / "home" / "recipes"


def launch(*arguments: str) -> Ended:
    return openlm("launch", *arguments, "--dry-run", variables={})


def test_a_derived_recipe_is_like_any_other(saved: Path) -> None:
    made = derive("demo", ["training.lr=2e-3", "milestones=[300K]"])
    assert not saved.exists()
    made.save()
    assert made.path == saved / "demo_lr_2e_3_milestones_300k.yaml" and made.path.stem in recipe_names()
    assert yaml.safe_load(made.path.read_text())["extends"] == "demo"
    experiment, demo = load_experiment(made.path.stem), load_experiment("demo")
    assert experiment == made.experiment
    assert (experiment.training.lr, experiment.milestones) == (2e-3, (300_000,))
    changed = {"name": demo.name, "description": demo.description, "milestones": demo.milestones}
    assert experiment.model_copy(update={**changed, "training": demo.training}) == demo
    assert experiment in load_recipes()[0]


def test_the_same_once_more_is_found_and_another_of_its_name_is_refused(saved: Path) -> None:
    derive("demo", ["training.lr=2e-3"], "mine").save()
    again = derive("demo", ["training.lr=2e-3"], "mine")
    assert again.path == saved / "mine.yaml" and again.experiment == load_experiment("mine")
    for recipe, override, name in (("demo", "training.lr=3e-3", "mine"), ("demo", "training.lr=2e-3", "pretrain_1b")):
        with pytest.raises(ConfigError, match=f"there is a recipe {name} already: .*{name}.yaml; give the new one"):
            derive(recipe, [override], name)
    assert derive("mine", ["seed=1"]).experiment.training.lr == 2e-3


def test_names_are_those_of_recipes_and_differ_where_settings_do(saved: Path) -> None:
    long = ["training.averages=[" + ",".join(f"ema_0.9{i}_10" for i in range(n)) + "]" for n in (8, 9)]
    names = [derive("demo", [item]).experiment.name for item in ("training.lr=2e-3", "training.lr=2e-4", *long)]
    assert len(set(names)) == 4 and max(map(len, names)) < 80
    assert derive("demo", ["description=Größe"]).experiment.name == "demo_description_gr_e"
    assert derive("demo", ["name=other", "seed=1"]).path == saved / "other.yaml"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("demo", "training.lrr=1"), "unknown key 'lrr'; did you mean 'lr'? (override training.lrr=1)"),
        (("demo", "training.lr=-1"), "training.lr: Input should be greater than 0 (override training.lr=-1)"),
        (("dmo", "training.lr=1"), "there is no recipe 'dmo'; did you mean 'demo'?"),
        (("demo", "training.lr=1", "--name", "Mine"), "name: String should match pattern"),
        (("demo", "training.lr=1", "--name", "../mine"), "name: String should match pattern"),
        (("demo", "training.lr=1", "--name", "evaluate_demo"), "mean different things by job evaluate_demo"),
        (
            ("demo", "seq_len=128"),
            "recipe demo and recipe demo_seq_len_128 mean different things by dataset embedded, "
            "dataset embedded_heldout; in demo_seq_len_128 give other names: "
            "sources.0.name=NAME validation.source.name=NAME",
        ),
        (
            ("demo", "tokenizer.train.vocab_size=512", "sources.0.name=a", "validation.source.name=b"),
            "mean different things by tokenizer demo_bpe; in ",
        ),
    ],
)
def test_what_is_wrong_is_one_line_and_nothing_is_saved(saved: Path, arguments: tuple[str, ...], message: str) -> None:
    refused = launch(*arguments)
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1 and not refused.stdout
    assert message in refused.stderr
    assert not saved.exists()


def test_other_names_make_other_data(saved: Path) -> None:
    """What the refusal says works."""
    names = ("tokenizer.name=t", "sources.0.name=a", "validation.source.name=b")
    derive("demo", ["tokenizer.train.vocab_size=512", *names], "small_vocabulary").save()
    loaded, not_loaded = load_recipes()
    assert not_loaded == {} and {"demo", "small_vocabulary"} <= {e.name for e in loaded}


def test_a_file_is_no_recipe_until_it_is_copied(saved: Path, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("extends: demo\nname: mine\n")
    refused = launch(str(file))
    assert refused.returncode == 2
    assert f"{file} is a file, and a recipe's name is needed: copy it to {saved}, which makes it one" in refused.stderr
    saved.mkdir(parents=True)
    file.rename(saved / "mine.yaml")
    assert "mine" in launch("mine").stderr


def test_a_dry_run_saves_nothing(saved: Path) -> None:
    shown = launch("demo", "training.lr=2e-3")
    assert shown.returncode == 0 and "/runs/demo_lr_2e_3/v1/" in shown.stdout and not saved.exists()


def test_of_a_home_at_a_url_recipes_are_in_the_local_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENLM_HOME", "s3://bucket/home")
    monkeypatch.setenv("OPENLM_HOME_CACHE", str(tmp_path))
    derive("demo", ["seed=1"]).save()
    assert (tmp_path / "bucket" / "home" / "recipes" / "demo_seed_1.yaml").exists()
    assert load_experiment("demo_seed_1").seed == 1
