"""`openlm fork` writes a recipe that is like any other."""

from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from openlm_pipeline.cli.main import app
from openlm_pipeline.errors import ConfigError
from openlm_pipeline.experiments import load_experiment
from openlm_pipeline.experiments.spec import Parent


@pytest.fixture
def recipes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("OPENLM_RECIPES", str(tmp_path))
    monkeypatch.setenv("OPENLM_HOME", str(tmp_path / "home"))
    return tmp_path


def fork(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["fork", *arguments])


def test_a_fork_is_a_recipe_with_a_parent_and_its_changes(recipes: Path) -> None:
    made = fork("demo@400K", "demo_cooled", "training.schedule=wsd", "training.decay=100K", "milestones=[600K]")
    assert made.exit_code == 0, made.output
    assert "training.schedule constant -> wsd" in made.output
    assert "export OPENLM_RECIPES" not in made.output
    experiment, demo = load_experiment("demo_cooled"), load_experiment("demo")
    assert experiment.parent == Parent(run="demo", milestone=400_000)
    assert (experiment.milestones, experiment.training.decay) == ((600_000,), 100_000)
    assert experiment.sources == demo.sources
    twice = fork("demo_cooled@600K", "again", "milestones=[700K]", "parent.optimizer=reset")
    assert twice.exit_code == 0, twice.output
    assert load_experiment("again").parent == Parent(run="demo_cooled", milestone=600_000, optimizer="reset")


def test_later_milestones_are_the_parents_own(recipes: Path) -> None:
    assert fork("demo@200K", "slow", "training.lr=1e-4").exit_code == 0
    assert load_experiment("slow").milestones == (400_000, 800_000)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("demo", "x"), "does not say where to begin; write RECIPE@MILESTONE"),
        (("demo@lots", "x"), "is not a number of tokens"),
        (("nosuch@1M", "x"), "there is no recipe 'nosuch'"),
        (("demo@300K", "x"), "demo has no milestone at 300K tokens; it has 200K, 400K, 800K"),
        (("demo@800K", "x"), "demo has no milestone after 800K; give some"),
        (("demo@400K", "demo"), "there is a recipe demo already"),
        (("demo@400K", "x", "training.lr=-1"), "training.lr"),
        (("demo@400K", "x", "milestones=[300K]"), "less than one global batch after the parent's 400K"),
    ],
)
def test_what_is_wrong_is_named_and_no_file_is_left(recipes: Path, arguments: tuple[str, ...], message: str) -> None:
    refused = fork(*arguments)
    assert isinstance(refused.exception, ConfigError)
    assert message in str(refused.exception)
    assert list(recipes.iterdir()) == []


def test_without_a_folder_of_recipes_it_is_in_the_home(recipes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENLM_RECIPES")
    assert fork("demo@400K", "x").exit_code == 0
    assert load_experiment("x").parent == Parent(run="demo", milestone=400_000)
    assert (recipes / "home" / "recipes" / "x.yaml").exists()
    made = fork("demo@400K", "y", "--recipes", str(recipes / "new"))
    assert f"export OPENLM_RECIPES={recipes / 'new'}" in made.output
