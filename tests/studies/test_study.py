"""A study is a family of ordinary recipes: what it expands to, that forks save work and change nothing, and growth."""

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from commands import openlm
from small_run import BATCH, SmallRun, train_here

from openlm_pipeline.errors import ConfigError
from openlm_pipeline.experiments import Experiment, load_experiment, recipe_names
from openlm_pipeline.pipeline.recipes import load_recipes
from openlm_pipeline.runs.folder import RunFolder
from openlm_pipeline.studies.overview import plan_study
from openlm_pipeline.studies.study import StudyRun, expand, load_study, save_recipes

SIZES = [{"hidden_dim": 16, "n_layers": 1, "n_heads": 2}, {"hidden_dim": 32, "n_layers": 2, "n_heads": 2}]
BUDGETS = [10 * BATCH, 20 * BATCH]


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SmallRun:
    made = SmallRun(tmp_path, (4,))
    monkeypatch.setenv("OPENLM_HOME", str(made.home.root))
    monkeypatch.setenv("OPENLM_RECIPES", str(tmp_path))
    return made


@pytest.fixture
def runs_of(small: SmallRun) -> Callable[..., list[StudyRun]]:
    """Expand a study of the small recipe, with keys changed."""

    def expanded(**changes) -> list[StudyRun]:
        document = {"base": "small", "models": SIZES, "tokens": BUDGETS, "cooldown": 0.2, **changes}
        path = small.recipe.with_name("ladder.study.yaml")
        path.write_text(yaml.safe_dump({k: v for k, v in document.items() if v is not None}))
        return expand(load_study("ladder"))

    return expanded


def test_budgets_share_a_trunk(runs_of):
    runs = runs_of()
    assert [(run.name, run.budget and run.budget // BATCH) for run in runs] == [
        ("ladder_d16_l1_h2", None),
        ("ladder_d16_l1_h2_2p56k", 10),
        ("ladder_d16_l1_h2_5p12k", 20),
        ("ladder_d32_l2_h2", None),
        ("ladder_d32_l2_h2_2p56k", 10),
        ("ladder_d32_l2_h2_5p12k", 20),
    ]
    trunk, short, long = (run.experiment for run in runs[:3])
    assert [m // BATCH for m in trunk.milestones] == [8, 16]
    assert (short.parent.run, short.parent.milestone // BATCH, long.parent.milestone // BATCH) == (trunk.name, 8, 16)
    assert trunk.evaluation is None and {run.experiment.study for run in runs} == {"ladder"}


def _rates(experiment: Experiment, steps: range) -> list[float]:
    rate = experiment.learning_rates(experiment.start_tokens())
    return [rate(step) for step in steps]


def test_a_fork_is_the_run_that_it_saves(small: SmallRun, runs_of):
    """Rates, samples and weights are those of one run with that schedule from the start, bit for bit."""
    trunk, short = (run.experiment for run in runs_of()[:2])
    alone = load_experiment(
        str(small.recipe),
        [
            "version=alone", "model={hidden_dim: 16, n_layers: 1, n_heads: 2}", f"milestones=[{10 * BATCH}]",
            "training.schedule=wsd", f"training.decay={2 * BATCH}",
        ],
    )  # fmt: skip
    assert _rates(trunk, range(8)) + _rates(short, range(8, 10)) == _rates(alone, range(10))
    for experiment in (trunk, short, alone):
        train_here(experiment, small.home)
    digests = [RunFolder(small.home.run(e.name, e.version)).saved()[-1].weights_digest for e in (short, alone)]
    assert digests[0] == digests[1]


def test_the_plan_counts_shared_work_once(small: SmallRun, runs_of):
    runs = runs_of()
    plan = plan_study(load_study("ladder"), runs, small.home, None, 0.4, None)
    assert plan.tokens == 2 * (16 + 2 + 4) * BATCH and plan.tokens_apart == 2 * (10 + 20) * BATCH
    train_here(runs[0].experiment, small.home)
    again = plan_study(load_study("ladder"), runs, small.home, "H100", 0.4, None)
    assert [cost.tokens_done // BATCH for cost in again.runs] == [16, 0, 0, 0, 0, 0]
    assert again.gpu_hours < sum(cost.gpu_hours for cost in again.runs)


def test_settings_seeds_and_a_grid_or_a_list(runs_of):
    varied = {"training.lr": [0.01, 0.02], "training.global_batch": [256, 512]}
    grid, rows = runs_of(vary=varied), runs_of(vary=varied, combine="list")
    assert len(grid) == 2 * len(rows) == 2 * 4 * 3
    assert {(r.experiment.training.lr, r.experiment.training.global_batch) for r in rows} == {(0.01, 256), (0.02, 512)}
    (lr,) = {tuple(sorted({r.experiment.training.lr for r in runs_of(vary={"training.lr": of})}))
             for of in [{"log": [0.001, 0.004], "count": 3}]}  # fmt: skip
    assert lr == (0.001, 0.002, 0.004)
    seeds = [(run.size, run.experiment.seed) for run in runs_of(seeds=[0, 7]) if run.budget is None]
    assert seeds == [("d16_l1_h2", 0), ("d16_l1_h2", 7), ("d32_l2_h2", 0)]
    assert len(runs_of(seeds=[0, 7], seeds_of="all")) == 12


def test_without_a_cooldown_budgets_are_milestones(runs_of):
    runs = runs_of(cooldown=0)
    assert len(runs) == 4 and len({run.name for run in runs}) == 2
    assert [run.budget for run in runs[:2]] == list(runs[0].experiment.milestones)


def test_a_row_more_changes_no_run_that_is_there(small: SmallRun, runs_of):
    first = runs_of()
    save_recipes(first)
    for run in first[:3]:
        train_here(run.experiment, small.home)
    before = {p: p.stat().st_mtime_ns for p in (small.home.root / "runs").rglob("*.distcp")}
    more = runs_of(models=[*SIZES, {"hidden_dim": 48, "n_layers": 2, "n_heads": 2}], tokens=[*BUDGETS, 40 * BATCH])
    assert {run.name for run in first} < {run.name for run in more}
    written = save_recipes(more)
    assert {p.stem for p in written} == {run.name for run in more} - {r.name for r in first if r.budget is not None}
    for run in more[:4]:
        train_here(run.experiment, small.home)
    assert {p: p.stat().st_mtime_ns for p in before} == before
    assert RunFolder(small.home.run("ladder_d16_l1_h2", "v1")).saved()[-1].step == 32


def test_saved_recipes_are_ordinary_ones(small: SmallRun, runs_of):
    runs = runs_of()
    assert len(save_recipes(runs)) == 6 and save_recipes(runs) == []
    assert {run.name for run in runs} <= set(recipe_names()) and "ladder.study" not in recipe_names()
    loaded, not_loaded = load_recipes(["ladder_*"])
    assert {e.name: e for e in loaded} == {run.name: run.experiment for run in runs} and not not_loaded
    mine = small.home.root / "recipes" / f"{runs[0].name}.yaml"
    mine.write_text("name: mine\n")
    with pytest.raises(ConfigError, match="which no study made"):
        save_recipes(runs)


WRONG = {
    "no budget": ({"tokens": None}, "give tokens or tokens_per_parameter"),
    "both": ({"tokens_per_parameter": [1]}, "give tokens or tokens_per_parameter"),
    "twice": ({"seeds": [1, 1]}, "something twice"),
    "its own": ({"vary": {"seed": [1, 2]}}, "the study itself sets that"),
    "typo": ({"varies": {}}, "varies"),
    "no field": ({"vary": {"training.lrr": [1, 2]}}, "lrr"),
    "named": ({"models": ["open_lm_11m"]}, "give shapes"),
    "few steps": ({"tokens": [BATCH]}, "too few steps"),
    "no base": ({"base": "smal"}, "did you mean"),
    "no held-out text": ({"set": {"validation": None}}, "held-out text"),
    "unequal": ({"vary": {"training.lr": [1], "training.eps": [1, 2]}, "combine": "list"}, "as many values"),
}


@pytest.mark.parametrize("changes, told", WRONG.values(), ids=WRONG)
def test_what_is_wrong_is_named(runs_of, changes, told):
    with pytest.raises(ConfigError, match=told):
        runs_of(**changes)


def test_the_name_of_a_recipe_is_taken(small: SmallRun):
    small.recipe.with_name("small.study.yaml").write_text("base: small")
    with pytest.raises(ConfigError, match="has the name of a recipe"):
        load_study("small")
    with pytest.raises(ConfigError, match="no study 'demo_lader'; did you mean 'demo_ladder'"):
        load_study("demo_lader")


@pytest.mark.parametrize("name", ["demo_ladder", "pretrain_ladder", "modern_ladder"])
def test_shipped_studies_can_be_planned(name: str, tmp_path: Path):
    ended = openlm("study", "plan", name, "--gpu", "H100", "--price", "2", variables={"OPENLM_HOME": str(tmp_path)})
    assert ended.returncode == 0, ended.stderr
    assert "GPU-hours" in ended.stdout and " at the price given" in ended.stdout
    assert not (tmp_path / "recipes").exists()


def test_over_its_budget_a_study_is_not_run(small: SmallRun, runs_of):
    runs_of(budget_gpu_hours=1e-9)
    ended = openlm("study", "run", "ladder", variables={"OPENLM_HOME": str(small.home.root)})
    assert ended.returncode == 2 and "over the study's budget" in ended.stderr
    assert not (small.home.root / "recipes").exists()
    status = openlm("study", "status", "ladder", variables={"OPENLM_HOME": str(small.home.root)})
    assert "0 of 4 points are there" in status.stdout
