"""`openlm plan`: what a recipe would do, why, and what it takes; nothing is started."""

from typing import Annotated

import typer
from rich.console import Console

Gpu = Annotated[str | None, typer.Option(help="A GPU such as H100, for the time; default: what the run measured.")]
Mfu = Annotated[float, typer.Option(help="With --gpu: the share of its peak that is reached.", min=0.01, max=1)]
Price = Annotated[float | None, typer.Option(help="Of a GPU-hour, in any currency.", min=0)]


def plan(
    recipe: Annotated[str, typer.Argument(help="Name of a recipe (`openlm recipes`) or path of a YAML file.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings to change, such as training.lr=1e-3.")
    ] = None,
    gpu: Gpu = None,
    mfu: Mfu = 0.4,
    price: Price = None,
) -> None:
    """Say what is fresh, stale or missing, which field changed, and the tokens, time, disk and money of what is left.

    Examples:

    openlm plan demo

    openlm plan pretrain_1b training.lr=5e-4 --gpu H100 --price 2.5
    """
    from openlm_pipeline.experiments import load_experiment
    from openlm_pipeline.pipeline.plan import plan as make_plan
    from openlm_pipeline.storage.home import Home

    console = Console(highlight=False, soft_wrap=True)
    made = make_plan(load_experiment(recipe, overrides or []), Home.from_env(), device=gpu, mfu=mfu, price=price)
    for line in made.lines():
        console.print(line, markup=False)
