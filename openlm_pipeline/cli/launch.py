"""`openlm launch`: a recipe's job through Dagster, after a look at what it would take, or just that look."""

import json
import os
import re
import subprocess
import sys
import uuid
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from openlm_pipeline.cli.options import Allow, Gpu, Mfu, Overrides, Price
from openlm_pipeline.cli.ui import dagster_environment, definitions_option
from openlm_pipeline.errors import ConfigError, OpenLMError
from openlm_pipeline.result import ALLOW_TAG, parse_allow, refuse
from openlm_pipeline.strict import SECRET_NAME

if TYPE_CHECKING:
    from openlm_pipeline.experiments import Experiment
    from openlm_pipeline.storage.home import Home

_UI = "http://127.0.0.1:3000"
_ERROR = re.compile(r"[\w.]+\.\w+: ")
"""The line of a traceback that says what went wrong."""
_SECRET_LETTERS = 8
"""What is shorter is no secret, and would be found in other words."""


def submission(experiment: "Experiment", home: "Home", allow: Collection[str] = ()) -> str:
    """What the recipe's launcher would start: a shell command, a batch script, or a manifest.

    Where the recipe has put the value of a variable with a secret's name into it, it shows the variable.
    """
    from openlm_pipeline.runs.folder import RunFolder
    from openlm_pipeline.runs.launch import launcher_of

    run = RunFolder(home.run(experiment.name, experiment.version))
    text = launcher_of(experiment, home, run, allow=allow).show(experiment.milestones[-1])
    for name, value in sorted(os.environ.items(), key=lambda item: -len(item[1])):  # one may begin with another
        if len(value) >= _SECRET_LETTERS and SECRET_NAME.fullmatch(name):
            text = text.replace(value, f"${{{name}}}")
    return text


def launch(
    recipe: Annotated[str, typer.Argument(help="Name of a recipe (`openlm recipes`).")],
    overrides: Overrides = None,
    name: Annotated[
        str | None, typer.Option(help="Name of the recipe with these settings; default: RECIPE_KEY_VALUE.")
    ] = None,
    budget: Annotated[
        float | None,
        typer.Option(help="GPU-hours over which --yes is needed.", min=0, envvar="OPENLM_BUDGET_GPU_HOURS"),
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Launch although it is over the budget.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Start nothing: the plan on stderr, what would be submitted on stdout.")
    ] = False,
    allow: Allow = None,
    gpu: Gpu = None,
    mfu: Mfu = 0.4,
    price: Price = None,
    ui: Annotated[str, typer.Option(help="Where the Dagster UI is, for the link.", envvar="OPENLM_UI")] = _UI,
) -> None:
    """Show the plan of a recipe, launch its job, and say its run id and link; the run outlives this command.

    With settings to change it launches a new recipe, which extends RECIPE and is saved in OPENLM_HOME/recipes; the same
    command again finds it there.
    With --budget a launch of more GPU-hours, or of unknown length, needs --yes. With --dry-run it starts nothing and
    prints what the recipe's launcher would start: the torchrun command, Slurm's batch script or Kubernetes' manifest;
    nothing where nothing is left to train.

    Examples:

    openlm launch pretrain_1b --gpu H100 --budget 500

    openlm launch demo training.lr=2e-3 --name demo_faster
    """
    from openlm_pipeline.experiments import load_experiment
    from openlm_pipeline.pipeline.new_recipe import derive
    from openlm_pipeline.pipeline.plan import plan
    from openlm_pipeline.pipeline.recipes import load_recipes
    from openlm_pipeline.storage.home import Home

    console = Console(highlight=False, soft_wrap=True, stderr=dry_run)
    new = derive(recipe, overrides or [], name) if overrides or name or recipe.endswith((".yaml", ".yml")) else None
    if new is None and (error := load_recipes()[1].get(recipe)):
        raise ConfigError(error)
    experiment, home = new.experiment if new else load_experiment(recipe), Home.from_env()
    recipe = experiment.name
    made = plan(experiment, home, device=gpu, mfu=mfu, price=price)
    for line in made.lines():
        console.print(line, markup=False)
    consents = parse_allow(allow)
    if dry_run:
        if made.cost.tokens:
            print(submission(experiment, home, consents))
        return
    refuse(made.findings, consents)
    hours = made.cost.gpu_hours
    if budget is not None and made.cost.tokens and not yes and (hours is None or hours > budget):
        known = "of a length that is not known" if hours is None else f"of {hours:,.4g} GPU-hours"
        raise ConfigError(f"training {known} is over the budget of {budget:g}; add --yes to launch it all the same")
    if new:
        new.save()
        console.print(f"recipe {recipe}: {new.path}", markup=False)
    run_id, tags = str(uuid.uuid4()), json.dumps({ALLOW_TAG: ",".join(sorted(consents))} if consents else {})
    environment = dagster_environment()
    if only := environment.get("OPENLM_ONLY"):
        environment["OPENLM_ONLY"] = f"{only},{recipe}"
    log = Path(environment["DAGSTER_HOME"]) / f"launch-{run_id}.log"
    with log.open("wb") as out:  # a file: where it is a pipe, the command lasts as long as the run
        command = [sys.executable, "-m", "dagster", "job", "launch", *definitions_option()]
        command += ["-j", recipe, "--run-id", run_id, "--tags", tags]
        done = subprocess.run(command, stdout=out, stderr=subprocess.STDOUT, env=environment, check=False)
    if done.returncode:
        lines = [line for line in log.read_text(errors="replace").splitlines() if line]
        why = next((line for line in reversed(lines) if _ERROR.match(line)), lines[-1] if lines else "it said nothing")
        database = f". See to its database, or move {log.parent} away with Dagster's history; what is done stays done"
        raise OpenLMError(
            f"Dagster did not launch {recipe}: {why}{database if 'sqlalchemy' in why else ''}. All that it said: {log}"
        )
    console.print(f"launched {recipe}: run {run_id}", markup=False)
    console.print(f"  {ui.rstrip('/')}/runs/{run_id} (`openlm ui`); log {log}", markup=False)
