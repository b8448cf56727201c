"""`openlm`: every stage as a plain command. A command prints what it does, and exits with the error's own code.

Exit codes: 0 done, 1 failed, 2 wrong recipe or flag, 3 an input is missing, 4 data is damaged, 5 a folder belongs to
another run, 6 training ended early, 7 another process is at it, 130 interrupted.
"""

import subprocess
import sys
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from openlm_pipeline.errors import ConfigError, OpenLMError
from openlm_pipeline.experiments import Experiment, load_experiment, recipe_names
from openlm_pipeline.layout import Home
from openlm_pipeline.units import format_tokens, parse_tokens

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Pretraining of language models as one reproducible pipeline: raw text, shards, milestones, scorecards.\n\n"
    "State lives under OPENLM_HOME (default ./openlm_home). Every command does only what is missing and can be run "
    "again after any interruption.",
)
console = Console(highlight=False, soft_wrap=True)
Recipe = Annotated[str, typer.Argument(help="Name of a recipe (`openlm recipes`) or path of a YAML file.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings to change, such as training.lr=1e-3.")
]


def say(line: str) -> None:
    console.print(line, markup=False)


def _load(recipe: str, overrides: list[str] | None) -> tuple[Experiment, Home]:
    return load_experiment(recipe, overrides or []), Home.from_env()


@app.command()
def demo() -> None:
    """Run the whole pipeline through Dagster on the embedded corpus: minutes on two CPU cores.

    Example: openlm demo
    """
    raise typer.Exit(subprocess.run([sys.executable, "-m", "orchestration", "demo"], check=False).returncode)


@app.command()
def tokenize(
    recipe: Recipe,
    overrides: Overrides = None,
    workers: Annotated[int | None, typer.Option(help="Processes of the local Dask cluster; default: CPUs.")] = None,
    dask_address: Annotated[str | None, typer.Option(help="Join this Dask scheduler, such as tcp://host:8786.")] = None,
) -> None:
    """Turn a recipe's raw files into shards: tokenizer, token streams, packing.

    Files that are done already are reused. Bad records go to quarantine.jsonl beside the shards.

    Example: OPENLM_RAW_DATA=/data/pile openlm tokenize pretrain_1b --workers 16
    """
    from openlm_pipeline import stages
    from openlm_pipeline.tokenization.cluster import DaskSettings

    experiment, home = _load(recipe, overrides)
    settings = {"workers": workers, "address": dask_address}
    clients = DaskSettings(**{k: v for k, v in settings.items() if v is not None}).client
    stages.make_corpus(experiment, home, say)
    stages.ensure_tokenizer(experiment, home, say)
    for dataset in experiment.datasets():
        files, _ = stages.tokenize(dataset, home, clients, say)
        say(f"shards: {stages.make_shards(dataset, files, home, clients, say).path}")


@app.command()
def train(
    recipe: Recipe,
    overrides: Overrides = None,
    until: Annotated[str | None, typer.Option(help="Stop after this many tokens, such as 250B.")] = None,
    supersede: Annotated[bool, typer.Option(help="Set a different run in the same folder aside.")] = False,
) -> None:
    """Train a recipe's model through its milestones with torchrun, from the newest checkpoint on.

    Ctrl-C saves a checkpoint and stops. `torchrun -m train RECIPE` does the same without this command.

    Example: openlm train demo training.lr=1e-3 --until 500K
    """
    from openlm_pipeline import stages
    from openlm_pipeline.runs.launch import MilestoneReached, Progress

    experiment, home = _load(recipe, overrides)
    limit = _tokens(until) if until else experiment.milestones[-1]
    for event in stages.train(experiment, home, limit, say, supersede=supersede):
        if isinstance(event, Progress):
            say(progress_line(event.record))
        elif isinstance(event, MilestoneReached):
            say(f"milestone {event.label}: {event.checkpoint.path}")


def _tokens(text: str) -> int:
    try:
        return parse_tokens(text)
    except ValueError as e:
        raise ConfigError(f"--until: {e}") from e


def progress_line(record: dict[str, float]) -> str:
    """A record of `metrics.jsonl` for people."""
    start = f"step {record['step']}, {format_tokens(int(record['tokens']))} tokens: "
    if "validation_loss" in record:
        return start + f"validation loss {record['validation_loss']:.4f}"
    return start + f"loss {record['loss']:.4f}, {record['tokens_per_second']:,.0f} tokens/s"


@app.command()
def evaluate(
    recipe: Recipe,
    overrides: Overrides = None,
    milestone: Annotated[list[str] | None, typer.Option(help="Only this one, such as t0250B or 250B.")] = None,
) -> None:
    """Score a run's milestones with the recipe's suite; what is scored already is reused.

    Example: openlm evaluate demo --milestone 500K
    """
    from openlm_pipeline import stages
    from openlm_pipeline.runs.launch import milestone_checkpoints

    experiment, home = _load(recipe, overrides)
    names = {
        name: label for label, tokens in experiment.labelled_milestones() for name in (label, format_tokens(tokens))
    }
    if unknown := [m for m in milestone or [] if m not in names]:
        raise ConfigError(f"recipe {experiment.name} has no milestone {unknown[0]}; it has {', '.join(names)}")
    labels = [names[m] for m in milestone or []]
    if not labels:
        labels = list(milestone_checkpoints(experiment, stages.open_run(experiment, home))) or [next(iter(names))]
    for label in labels:
        say(f"scorecard: {stages.score(experiment, home, label, say).path}")


@app.command()
def report(recipe: Recipe, overrides: Overrides = None) -> None:
    """Write the report of a run: Markdown, one self-contained HTML page, CSV and Parquet.

    Example: openlm report demo
    """
    from openlm_pipeline import stages

    experiment, home = _load(recipe, overrides)
    stages.make_report(experiment, home, say)


@app.command()
def models() -> None:
    """List the models that a recipe can name, with their sizes and OpenLM's aliases."""
    from openlm_pipeline.models import count_parameters
    from openlm_pipeline.models.config import ALIASES, MODELS

    table = Table("name", "parameters", "hidden_dim", "n_layers", "n_heads", "aliases", box=None)
    for name, config in MODELS.items():
        aliases = ", ".join(a for a, target in ALIASES.items() if target == name)
        shape = (str(config.hidden_dim), str(config.n_layers), str(config.n_heads))
        table.add_row(name, f"{count_parameters(config):,}", *shape, aliases)
    console.print(table)


@app.command()
def recipes() -> None:
    """List the recipes: those that ship, and those in the folders of OPENLM_RECIPES."""
    table = Table("name", "milestones", "description", box=None)
    for name in recipe_names():
        experiment = load_experiment(name)
        table.add_row(name, " ".join(format_tokens(t) for t in experiment.milestones), experiment.description)
    console.print(table)


def main() -> None:
    """Run the command; expected errors end it with one message and their exit code."""
    try:
        app()
    except OpenLMError as e:
        Console(stderr=True, highlight=False, soft_wrap=True).print(f"error: {e}", markup=False)
        sys.exit(e.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
