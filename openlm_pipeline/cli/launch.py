"""`openlm launch`: a recipe's job through Dagster, after a look at what it would take."""

import os
import subprocess
import sys
import uuid
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from openlm_pipeline.cli.plan import Gpu, Mfu, Price
from openlm_pipeline.errors import ConfigError, OpenLMError

_UI = "http://127.0.0.1:3000"


def launch(
    recipe: Annotated[str, typer.Argument(help="Name of a recipe (`openlm recipes`).")],
    budget: Annotated[
        float | None,
        typer.Option(help="GPU-hours over which --yes is needed.", min=0, envvar="OPENLM_BUDGET_GPU_HOURS"),
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Launch although it is over the budget.")] = False,
    gpu: Gpu = None,
    mfu: Mfu = 0.4,
    price: Price = None,
    ui: Annotated[str, typer.Option(help="Where the Dagster UI is, for the link.", envvar="OPENLM_UI")] = _UI,
) -> None:
    """Show the plan of a recipe, launch its job, and say its run id and link; the run outlives this command.

    Run it from the project's root. With --budget a launch of more GPU-hours, or of unknown length, needs --yes.

    Example: openlm launch pretrain_1b --gpu H100 --budget 500
    """
    from openlm_pipeline.experiments import load_experiment, recipe_names
    from openlm_pipeline.layout import Home
    from openlm_pipeline.planning import plan

    if recipe not in recipe_names():
        raise ConfigError(f"there is no recipe {recipe!r}; a file becomes one in a folder of OPENLM_RECIPES")
    if not Path("orchestration/definitions.py").is_file():
        raise ConfigError("`openlm launch` runs from the project's root folder, where orchestration/ is")
    console = Console(highlight=False, soft_wrap=True)
    made = plan(load_experiment(recipe), Home.from_env(), device=gpu, mfu=mfu, price=price)
    for line in made.lines():
        console.print(line, markup=False)
    hours = made.cost.gpu_hours
    if budget is not None and made.cost.tokens and not yes and (hours is None or hours > budget):
        known = "of a length that is not known" if hours is None else f"of {hours:,.4g} GPU-hours"
        raise ConfigError(f"training {known} is over the budget of {budget:g}; add --yes to launch it all the same")
    run_id = str(uuid.uuid4())
    home = os.environ.setdefault("DAGSTER_HOME", str(Path(".dagster").absolute()))
    log = Path(home) / f"launch-{run_id}.log"
    with log.open("wb") as out:  # a file: where it is a pipe, the command lasts as long as the run
        done = subprocess.run(
            [sys.executable, "-m", "dagster", "job", "launch", "-j", recipe, "--run-id", run_id],
            stdout=out, stderr=subprocess.STDOUT, check=False,
        )  # fmt: skip
    if done.returncode:
        last = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
        raise OpenLMError(f"Dagster did not launch {recipe}:\n{last}")
    console.print(f"launched {recipe}: run {run_id}", markup=False)
    console.print(f"  {ui.rstrip('/')}/runs/{run_id} (`make ui`); log {log}", markup=False)
