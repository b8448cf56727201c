"""`openlm study plan|run|status`: the runs of a study."""

import os
import sys
from typing import Annotated

import typer
from rich.console import Console

from openlm_pipeline.cli.options import Allow, Gpu, Mfu, Price

StudyName = Annotated[str, typer.Argument(metavar="STUDY", help="Name of a study, or path of a file *.study.yaml.")]


def plan(study: StudyName, gpu: Gpu = None, mfu: Mfu = 0.4, price: Price = None) -> None:
    """Say which runs a study stands for, what each trains, how far it is, and the GPU-hours and money of what is left.

    Examples:

    openlm study plan demo_ladder

    openlm study plan pretrain_ladder --gpu H100 --price 2.5
    """
    from openlm_pipeline.storage.home import Home
    from openlm_pipeline.studies.overview import plan_study
    from openlm_pipeline.studies.study import expand, load_study

    console, found = Console(highlight=False, soft_wrap=True), load_study(study)
    for line in plan_study(found, expand(found), Home.from_env(), gpu, mfu, price).lines():
        console.print(line, markup=False)


def run(
    study: StudyName,
    slots: Annotated[int, typer.Option(min=1, help="Runs that train, or are scored, at the same time.")] = 1,
    gpu: Gpu = None,
    mfu: Mfu = 0.4,
    yes: Annotated[bool, typer.Option("--yes", help="Run although it is over the study's budget.")] = False,
    allow: Allow = None,
) -> None:
    """Train, score and fit all runs of a study as one Dagster run in this terminal; what is done is not done again.

    Its recipes are saved in OPENLM_HOME/recipes, where the UI has them as one group and one job of the study's name.
    Stop it at any time: the same command goes on. A study with more sizes, budgets or seeds trains what is new alone.

    Examples:

    openlm study run demo_ladder --slots 2

    openlm study run pretrain_ladder --gpu H100 --yes
    """
    from openlm_pipeline.errors import ConfigError
    from openlm_pipeline.result import parse_allow
    from openlm_pipeline.runs.programs import attend, starting
    from openlm_pipeline.storage.home import Home
    from openlm_pipeline.studies.overview import plan_study
    from openlm_pipeline.studies.study import expand, load_study, save_recipes

    console, found = Console(highlight=False, soft_wrap=True), load_study(study)
    runs, consents = expand(found), parse_allow(allow)
    made = plan_study(found, runs, Home.from_env(), gpu, mfu, None)
    hours, budget = made.gpu_hours, found.budget_gpu_hours
    is_over = budget is not None and (hours is None or hours > budget)
    if is_over and not yes and any(cost.tokens_done < cost.tokens for cost in made.runs):
        known = "of a length that is not known without --gpu" if hours is None else f"of {hours:,.4g} GPU-hours"
        raise ConfigError(f"training {known} is over the study's budget of {budget:g}; add --yes to run it")
    for path in save_recipes(runs):
        console.print(f"recipe {path}", markup=False)
    os.environ["OPENLM_ONLY"] = ",".join(dict.fromkeys(run.name for run in runs))
    if slots > 1:
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // slots)))
    flags = [f"--slots={slots}", *(f"--allow={name}" for name in sorted(consents))]
    raise typer.Exit(attend([sys.executable, *starting("orchestration"), found.name, *flags]))


def status(study: StudyName) -> None:
    """Say how far each run of a study is, with the loss and the score of its point.

    Example: openlm study status demo_ladder
    """
    from openlm_pipeline.storage.home import Home
    from openlm_pipeline.studies.overview import status_lines
    from openlm_pipeline.studies.study import expand, load_study

    console, found = Console(highlight=False, soft_wrap=True), load_study(study)
    for line in status_lines(expand(found), Home.from_env()):
        console.print(line, markup=False)


def report(study: StudyName) -> None:
    """Fit a study over the runs that are there, and write a page: the law, its residuals, what it predicts, all runs.

    Example: openlm study report demo_ladder
    """
    from openlm_pipeline.storage.home import Home
    from openlm_pipeline.studies.stage import make_fit

    console = Console(highlight=False, soft_wrap=True)
    made = make_fit(study, Home.from_env(), lambda line: console.print(line, markup=False))
    console.print(f"report: {made.path}", markup=False)
