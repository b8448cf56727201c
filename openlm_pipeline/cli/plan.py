"""`openlm plan`: what a recipe would do, why, and what it takes; nothing is started."""

from rich.console import Console

from openlm_pipeline.cli.options import Bandwidth, Gpu, Mfu, Overrides, Price, Recipe


def plan(
    recipe: Recipe,
    overrides: Overrides = None,
    gpu: Gpu = None,
    mfu: Mfu = 0.4,
    price: Price = None,
    bandwidth: Bandwidth = 50,
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
    experiment, home = load_experiment(recipe, overrides or []), Home.from_env()
    made = make_plan(experiment, home, device=gpu, mfu=mfu, price=price, bandwidth=bandwidth * 1e9)
    for line in made.lines():
        console.print(line, markup=False)
