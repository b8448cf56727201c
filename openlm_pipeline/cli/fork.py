"""`openlm fork`: a new run from a milestone of another."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from openlm_pipeline.errors import ConfigError
from openlm_pipeline.units import parse_tokens


def fork(
    origin: Annotated[
        str,
        typer.Argument(metavar="RECIPE@MILESTONE", help="Where to begin: pretrain_1b@250B, or pretrain_1b@latest."),
    ],
    name: Annotated[str, typer.Argument(help="Name of the new run.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings to change, such as training.lr=1e-4.")
    ] = None,
    recipes: Annotated[
        Path | None,
        typer.Option(help="Folder for the recipe; default: the first one of OPENLM_RECIPES, or OPENLM_HOME/recipes."),
    ] = None,
) -> None:
    """Write the recipe of a run that continues from a milestone of another: weights, optimizer, tokens, sample order.

    `@latest` is the run's newest checkpoint, which is kept from then on. Nothing is started: the new recipe is planned,
    trained and launched like any other. Another schedule begins at the rate the parent's has there. Each source
    continues where the parent left it, whatever its weight is now. parent.optimizer=reset begins
    with a new optimizer, parent.schedule=restart with the warm-up.

    Examples:

    openlm fork pretrain_1b@250B pretrain_1b_cooled training.schedule=wsd training.decay=50B milestones=[300B]

    openlm fork demo@400K demo_longer milestones=[1M] --recipes my_recipes
    """
    from openlm_pipeline.experiments import load_experiment
    from openlm_pipeline.experiments.load import user_folders
    from openlm_pipeline.fingerprint import differences
    from openlm_pipeline.pipeline.new_recipe import fork as make_fork
    from openlm_pipeline.pipeline.recipes import check_beside
    from openlm_pipeline.runs.identity import settings_identity
    from openlm_pipeline.runs.parent import pin_latest
    from openlm_pipeline.storage.home import Home

    recipe, at, tokens = origin.partition("@")
    if not at:
        raise ConfigError(f"{origin!r} does not say where to begin; write RECIPE@MILESTONE, such as demo@400K")
    try:
        milestone = pin_latest(load_experiment(recipe), Home.from_env()) if tokens == "latest" else parse_tokens(tokens)
    except ValueError as e:
        raise ConfigError(f"the milestone in {origin!r}: {e}") from e
    folder = recipes or user_folders()[0]
    console = Console(highlight=False, soft_wrap=True)
    made = make_fork(recipe, milestone, name, overrides or [], folder, pinned=tokens == "latest")
    made.save()
    console.print(f"{made.path}: {made.experiment.description}", markup=False)
    for line in differences(settings_identity(load_experiment(recipe)), settings_identity(made.experiment)):
        console.print(f"  {line}", markup=False)
    if folder.absolute() not in [f.absolute() for f in user_folders()]:
        console.print(f"export OPENLM_RECIPES={folder}  # so that {name} is known by its name", markup=False)
    try:
        check_beside(made.experiment)
    except ConfigError as e:
        console.print(f"warning: commands run it, and the graph leaves it out: {e}", markup=False)
    console.print(f"`openlm plan {name}` says what it takes, `openlm launch {name}` starts it", markup=False)
