"""`openlm report` and `openlm baselines`: tables of scores, as files and in marked blocks of Markdown files."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from openlm_pipeline.errors import ConfigError, DataError

_console = Console(highlight=False, soft_wrap=True)


def _say(line: str) -> None:
    _console.print(line, markup=False)


def report(
    recipe: Annotated[
        str | None, typer.Argument(help="Name of a recipe (`openlm recipes`) or path of a YAML file.")
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings to change, such as version=v2.")
    ] = None,
    update: Annotated[
        list[Path] | None, typer.Option(help="Fill the marked blocks of this Markdown file, such as README.md.")
    ] = None,
    check: Annotated[
        list[Path] | None, typer.Option(help="Fail (exit code 4) if a marked block of this file is out of date.")
    ] = None,
    model_card: Annotated[
        Path | None, typer.Option(help="Write a Hugging Face model card of the last scored milestone to this file.")
    ] = None,
    wandb: Annotated[bool, typer.Option("--wandb", help="Log the table to Weights & Biases (WANDB_PROJECT).")] = False,
) -> None:
    """Write the report of a run: Markdown, one self-contained HTML page, CSV and Parquet.

    A marked block of a Markdown file stands between `<!-- openlm:begin NAME -->` and `<!-- openlm:end NAME -->`. NAME
    is a recipe, for the table of its run, or `quoted FAMILY`, for published scores (`openlm baselines`).

    Examples:

    openlm report demo

    openlm report --update README.md

    openlm report --check README.md
    """
    from openlm_pipeline.experiments import load_experiment
    from openlm_pipeline.pipeline import reports as reporting
    from openlm_pipeline.storage.home import Home

    home = Home.from_env()
    if recipe is None and not (update or check):
        raise ConfigError("give a recipe, or --update or --check with a Markdown file")
    if recipe is None and (model_card or wandb):
        raise ConfigError("--model-card and --wandb need a recipe")
    if recipe is not None:
        experiment = load_experiment(recipe, overrides or [])
        reporting.make_report(experiment, home, _say)
        if model_card:
            _say(f"model card: {reporting.write_model_card(experiment, home, model_card)}")
        if wandb:
            _say(f"logged to {reporting.log_to_wandb(experiment, home)}")
    for path in update or []:
        changed = reporting.fill_blocks(path, home)
        _say(f"{path}: {'filled ' + ', '.join(changed) if changed else 'up to date'}")
    stale = {str(path): changed for path in check or [] if (changed := reporting.fill_blocks(path, home, write=False))}
    if stale:
        listed = "; ".join(f"{path}: {', '.join(names)}" for path, names in stale.items())
        raise DataError(f"out of date: {listed}. `openlm report --update FILE` fills them")


def baselines(
    table: Annotated[str | None, typer.Argument(help="Print this table of OpenLM: openlm_1b or openlm_7b.")] = None,
    run: Annotated[str | None, typer.Option(help="Recipe whose milestones stand beside it.")] = None,
) -> None:
    """List the published scores that a recipe can show beside its own (`evaluation.quoted`).

    With a name, print a table as OpenLM's README has it, in Markdown: tasks as rows, models as columns, empty where
    nothing was published.

    Examples:

    openlm baselines openlm_7b

    openlm baselines openlm_1b --run pretrain_1b
    """
    from openlm_pipeline.evaluation.baselines import quoted_baselines
    from openlm_pipeline.experiments import load_experiment
    from openlm_pipeline.pipeline import reports as reporting
    from openlm_pipeline.storage.home import Home
    from openlm_pipeline.units import format_tokens

    if table is not None:
        _say(reporting.openlm_table(table, load_experiment(run) if run else None, Home.from_env()))
        return
    if run is not None:
        raise ConfigError("--run needs the name of a table, such as openlm_1b")
    rows = Table("name", "family", "tokens", "average", box=None)
    for row in quoted_baselines():
        tokens = format_tokens(row.tokens) if row.tokens else ""
        rows.add_row(row.name, row.family, tokens, f"{row.average:.2f}" + ("*" if row.note else ""))
    _console.print(rows)
    for source in dict.fromkeys(row.source for row in quoted_baselines()):
        _say(f"source: {source}")
    for row in quoted_baselines():
        if row.note:
            _say(f"* {row.name}: {row.note}")
