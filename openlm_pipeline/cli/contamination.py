"""`openlm contamination`: which items of a suite a run has trained on."""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from openlm_pipeline.cli.options import Recipe
from openlm_pipeline.errors import ConfigError, nearest, printable

_console = Console(highlight=False, soft_wrap=True)
_tables = Console(highlight=False, soft_wrap=True, width=1000)


def _say(line: str) -> None:
    _console.print(printable(line), markup=False)


def contamination(
    recipe: Recipe,
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings to change, such as version=v2.")
    ] = None,
    milestone: Annotated[
        str | None, typer.Option(help="Such as t0250B or 250B; default: the last that is trained, or else the last.")
    ] = None,
    window: Annotated[str, typer.Option(help="50: letters and digits in a row; 13w: words.")] = "50",
    task: Annotated[str | None, typer.Option(help="A task of the suite, such as copa; default: all.")] = None,
    list_: Annotated[int, typer.Option("--list", help="Items to list, those with the largest overlap.", min=0)] = 20,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON, with every item that was seen.")] = False,
    remove: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write a list of the documents that hold items, to leave out.")
    ] = None,
    workers: Annotated[int | None, typer.Option(help="Processes that scan; default: one per CPU.", min=1)] = None,
) -> None:
    """Show which items of the suite stand in exactly the tokens that a run was trained on, up to a milestone.

    Shards are scanned once, on Dask, for windows of 50 letters and digits of each question and of its right answer;
    case, spacing and punctuation don't count. Any run, milestone and fork over these shards is then joined to that in
    seconds: tokens after which an item was first seen, the share of its windows that were (overlap), how many times;
    and the accuracy on clean and on seen items. Items of fewer than 30 letters are too short to tell.

    With --remove the documents of the recipe's sources in which items stand, at whatever time they are read, are
    written to a list; a source with `exclude: FILE` and a version of its own is tokenized without them.

    A milestone that is not trained yet is told what it will have seen.

    Examples:

    openlm contamination demo

    openlm contamination demo --remove contaminated.jsonl

    openlm contamination pretrain_1b --milestone 250B --task piqa --list 50 --json
    """
    from openlm_pipeline.experiments import load_experiment
    from openlm_pipeline.lineage.windows import RULES
    from openlm_pipeline.pipeline import contamination as stage
    from openlm_pipeline.pipeline.items import milestone_named
    from openlm_pipeline.pools import DaskSettings
    from openlm_pipeline.reports.contamination import contamination as tables
    from openlm_pipeline.runs.folder import RunFolder
    from openlm_pipeline.runs.launch import milestone_checkpoints
    from openlm_pipeline.storage.home import Home
    from openlm_pipeline.units import format_tokens

    recipe, _, one = recipe.partition("@")
    experiment, home = load_experiment(recipe, overrides or []), Home.from_env()
    if window not in RULES:
        raise ConfigError(f"--window {window}: {nearest(window, RULES)}")
    if named := milestone or one:
        label = milestone_named(experiment, named)
    else:
        trained = milestone_checkpoints(experiment, RunFolder(home.run(experiment.name, experiment.version)))
        label = [name for name, _ in experiment.labelled_milestones() if not trained or name in trained][-1]
    quiet = (lambda line: None) if as_json else _say
    stage.scan_recipe(experiment, home, DaskSettings.from_env(workers=workers).pool, quiet, window)
    if remove:
        counts = stage.write_removals(experiment, home, remove, window)
        for name, count in counts.items():
            quiet(f"{name}: {count:,} documents to leave out")
        quiet(f"{remove} is the list; a source with `exclude: {remove}` and another `version` is made without them")
        return
    [found] = stage.joined(experiment, home, [label], window)
    rows, seen = found.by_task(), found.seen()
    if task:
        if task not in (tasks := list(dict.fromkeys(row["task"] for row in rows))):
            raise ConfigError(f"the suite has no task {task!r}; {nearest(task, tasks, 'it has')}")
        rows, seen = [row for row in rows if row["task"] == task], [row for row in seen if row["task"] == task]
    if as_json:
        typer.echo(json.dumps({**found.facts, "tasks": rows, "seen": seen}, indent=1))
        return
    shown = tables({format_tokens(found.facts["tokens"], 4): rows}, seen, found.notes(), list_)
    for headings, *lines in filter(None, (shown.tasks, shown.items)):
        table = Table(*headings, box=None)
        for line in lines:
            table.add_row(*line)
        _tables.print(table)
    if shown.num_seen > list_:
        _say(f"and {shown.num_seen - list_:,} more; --list shows more, --json all")
    for note in shown.notes:
        _say(note)
