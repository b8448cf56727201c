"""`openlm items`: the questions themselves, and what each milestone chose."""

import json
from dataclasses import asdict
from typing import Annotated, Literal

import typer

from openlm_pipeline.cli.options import Recipe
from openlm_pipeline.errors import printable


def items(
    recipe: Recipe,
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings to change, such as version=v2.")
    ] = None,
    task: Annotated[str | None, typer.Option(help="A task of the suite, such as copa; default: all.")] = None,
    shots: Annotated[int | None, typer.Option(help="Of a task with several numbers of solved rows.", min=0)] = None,
    milestones: Annotated[
        str | None, typer.Option(metavar="A..B", help="Those to show, such as 400K..800K; default: all.")
    ] = None,
    flipped: Annotated[
        str | None, typer.Option(metavar="A..B", help="Only items right at one of these two and wrong at the other.")
    ] = None,
    by: Annotated[
        Literal["file", "likelihood"],
        typer.Option(help="Order; likelihood: the largest change of the right option's first, flipped or not."),
    ] = "file",
    limit: Annotated[int, typer.Option(help="Items of each task.", min=1)] = 10,
    whole_prompts: Annotated[
        bool, typer.Option("--whole-prompts", help="The prompt as the model read it, solved rows included.")
    ] = False,
    format: Annotated[Literal["text", "json", "html"], typer.Option(help="html: a page to search.")] = "text",
) -> None:
    """Show the items of a task: the question, the options, what each milestone chose, and whether that is right.

    Beside each option stands its log-probability, per token where the task's rule compares that; `*` marks the chosen
    option and `gold` the right one. Items that the last two milestones judge differently come first.

    Examples:

    openlm items demo --task continuation --flipped 400K..800K

    openlm items demo --task continuation --flipped 200K..800K --by likelihood --limit 3 --whole-prompts

    openlm items demo --format html > items.html
    """
    from openlm_pipeline.experiments import load_experiment
    from openlm_pipeline.pipeline.items import look_at_items, milestone_range
    from openlm_pipeline.reports.items import as_text
    from openlm_pipeline.reports.render import items_page
    from openlm_pipeline.storage.home import Home

    recipe, _, one = recipe.partition("@")
    milestones = milestones or one or None
    experiment = load_experiment(recipe, overrides or [])
    labels = milestone_range(experiment, flipped or milestones)
    found = look_at_items(
        experiment,
        Home.from_env(),
        [labels[0], labels[-1]] if flipped else labels,
        task=task,
        shots=shots,
        only_flipped=bool(flipped) and by == "file",
        by=by,
        limit=limit,
        whole_prompts=whole_prompts,
    )
    if format == "json":
        typer.echo(json.dumps([asdict(of) for of in found], indent=1, ensure_ascii=False))
    elif format == "html":
        typer.echo(items_page(experiment, found))
    else:
        typer.echo(printable("\n\n".join(map(as_text, found))))
