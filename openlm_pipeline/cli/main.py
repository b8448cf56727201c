"""`openlm`: every stage as a plain command. A command prints what it does, and exits with the error's own code.

Exit codes: 0 done, 1 failed, 2 wrong recipe or flag, 3 an input is missing, 4 data is damaged, 5 a folder belongs to
another run or a consent is missing, 6 training ended early, 7 another process is at it, 8 the cluster failed,
130 interrupted, 143 ended by SIGTERM.
"""

import signal
import sys
import time
from gc import freeze
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from openlm_pipeline.cli.compare import compare
from openlm_pipeline.cli.contamination import contamination
from openlm_pipeline.cli.download import download
from openlm_pipeline.cli.env import env
from openlm_pipeline.cli.evaluate import evaluate
from openlm_pipeline.cli.export import export
from openlm_pipeline.cli.fork import fork
from openlm_pipeline.cli.fsck import fsck
from openlm_pipeline.cli.gc import gc
from openlm_pipeline.cli.generate import generate
from openlm_pipeline.cli.items import items
from openlm_pipeline.cli.launch import launch
from openlm_pipeline.cli.options import Allow, Overrides, Recipe
from openlm_pipeline.cli.plan import plan
from openlm_pipeline.cli.release import release
from openlm_pipeline.cli.report import baselines, report
from openlm_pipeline.cli.runs import cost, logs, runs, stop
from openlm_pipeline.cli.shards import shards_app
from openlm_pipeline.cli.show import show
from openlm_pipeline.cli.study import study_app
from openlm_pipeline.cli.trace import trace
from openlm_pipeline.cli.ui import ui
from openlm_pipeline.cli.verify import verify
from openlm_pipeline.errors import ConfigError, OpenLMError, disk_trouble, printable
from openlm_pipeline.experiments import Experiment, load_experiment
from openlm_pipeline.result import parse_allow
from openlm_pipeline.runs.programs import attend, starting
from openlm_pipeline.storage.home import Home
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
_INTERRUPTED, _ENDED = 130, 143
"""Exit codes after SIGINT, which Typer gives, and SIGTERM."""
_STOPPED = "stopped; what is done stays done, and the same command goes on from there"
app.add_typer(shards_app, name="shards")
app.add_typer(study_app, name="study")
_STAGES = (plan, launch, fork, download, evaluate, report, compare, items, contamination, generate, baselines, export)
for command in (*_STAGES, release, verify, trace, fsck, gc, ui, runs, show, logs, stop, cost, env):
    app.command()(command)


def _print_version(wanted: bool) -> None:
    if wanted:
        from openlm_pipeline.runs.environment import code_version

        typer.echo(f"openlm {code_version()}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and commit.")
    ] = False,
) -> None:
    pass


def say(line: str) -> None:
    console.print(printable(line), markup=False)


def _load(recipe: str, overrides: list[str] | None) -> tuple[Experiment, Home]:
    return load_experiment(recipe, overrides or []), Home.from_env()


@app.command()
def demo(allow: Allow = None) -> None:
    """Run the whole pipeline through Dagster on the embedded corpus: minutes on two CPU cores.

    Example: openlm demo
    """
    consents = [f"--allow={name}" for name in sorted(parse_allow(allow))]
    command = [sys.executable, *starting("orchestration"), "demo", *consents]
    raise typer.Exit(attend(command))


@app.command()
def tokenize(
    recipe: Annotated[
        str | None, typer.Argument(help="Name of a recipe (`openlm recipes`) or path of a YAML file.")
    ] = None,
    overrides: Overrides = None,
    workers: Annotated[
        int | None,
        typer.Option("--workers", "--num-workers", help="Worker processes; default: CPUs. 1 works without Dask."),
    ] = None,
    dask_address: Annotated[str | None, typer.Option(help="Join this Dask scheduler, such as tcp://host:8786.")] = None,
    input_files: Annotated[
        list[str] | None, typer.Option(help="Raw files, globs, folders or URLs, one or more; @FILE lists them.")
    ] = None,
    output_dir: Annotated[Path | None, typer.Option(help="Shards go to OUTPUT_DIR/<seqlen>-v1.")] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(help="A tokenizer.json, its folder, or a hub name; default: OPENLM_TOKENIZER, or GPT-NeoX-20B's."),
    ] = None,
    num_consumers: Annotated[int | None, typer.Option(help="Processes that pack; default: the workers.")] = None,
    upload_to_s3: Annotated[
        bool, typer.Option("--upload-to-s3", help="Move the shards to S3_BASE, such as s3://bucket/prefix/.")
    ] = False,
    seqlen: Annotated[
        int, typer.Option("--seqlen", "--seq-len", help="Tokens that a sample predicts; it holds one more.", min=8)
    ] = 2048,
    seed: Annotated[int, typer.Option(help="Seed of the document order.")] = 42,
    content_key: Annotated[str, typer.Option(help="Field of the text; `meta.text` is in the field meta.")] = "text",
    eot: Annotated[str, typer.Option(help="Token that ends each document.")] = "<|endoftext|>",
    bos: Annotated[str | None, typer.Option(help="Token that begins each document; by default none.")] = None,
    special_tokens: Annotated[
        str, typer.Option(help="What `<|endoftext|>` and the like become inside documents: ids, or text.")
    ] = "ids",
    engine: Annotated[str, typer.Option(help="Tokenizer engine: auto, or one by name.")] = "auto",
    format: Annotated[str | None, typer.Option(help="Suffix as which all files are read, such as .jsonl.")] = None,
    max_bad_fraction: Annotated[
        float, typer.Option(help="Share of bad records above which a file fails.", min=0, max=1)
    ] = 0.001,
    on_bad_file: Annotated[str, typer.Option(help="`skip` leaves damaged files out, counted; else: fail.")] = "fail",
    pad_id: Annotated[
        int | None,
        typer.Option(help="Fill the last sample up with this token instead of leaving it out; OpenLM's is 50256."),
    ] = None,
    allow: Allow = None,
) -> None:
    """Turn raw files into shards: those of a recipe, or those of --input-files with make_2048.py's arguments.

    Files that are done already are reused, whatever stopped the command. Bad records go to quarantine.jsonl beside the
    shards. OPENLM_DASK names a YAML file that describes a Dask cluster (see docs/operations.md).

    Examples:

    OPENLM_RAW_DATA=/data/pile openlm tokenize pretrain_1b --workers 16

    openlm tokenize --input-files /data/pile/*.jsonl.zst --output-dir /data/shards --num-workers 16
    """
    from openlm_pipeline.pipeline import data as data_stages
    from openlm_pipeline.pools import DaskSettings
    from openlm_pipeline.shards.inspect import summary

    began = time.monotonic()
    if (recipe is None) == (not input_files):
        raise ConfigError("give a recipe, or --input-files and --output-dir")
    if input_files:
        from openlm_pipeline.tokenization.standalone import make_shards_of_files, upload_url
        from openlm_pipeline.tokenizers.tokenizer import default_tokenizer

        if output_dir is None:
            raise ConfigError("--input-files needs --output-dir")
        target = upload_url() if upload_to_s3 else None
        made = make_shards_of_files(
            input_files,
            output_dir,
            tokenizer or default_tokenizer(),
            DaskSettings.from_env(workers=workers, address=dask_address).pool,
            DaskSettings.from_env(workers=num_consumers or workers, address=dask_address).pool,
            say,
            seq_len=seqlen,
            seed=seed,
            pad_id=pad_id,
            spec={"eot": eot, "bos": bos},
            source={
                "text_key": content_key,
                "format": format,
                "max_bad_fraction": max_bad_fraction,
                "on_bad_file": on_bad_file,
                "special_tokens": special_tokens,
            },
            engine=engine,
            upload=target,
            allow=parse_allow(allow),
        )
        say(f"shards: {target or made.path} ({made.facts['samples']} samples, {made.facts['tokens']} tokens)")
        say(summary(made.path, None if made.reused else time.monotonic() - began))
        return
    experiment, home = _load(recipe, overrides)
    pools = DaskSettings.from_env(workers=workers, address=dask_address).pool
    data_stages.make_corpus(experiment, home, say)
    data_stages.ensure_tokenizer(experiment, home, say, parse_allow(allow))
    for dataset in experiment.datasets():
        began = time.monotonic()
        files, _ = data_stages.tokenize(dataset, home, pools, say)
        made = data_stages.make_shards(dataset, files, home, pools, say, parse_allow(allow))
        if not dataset.source.shards:
            say(summary(made.path, None if made.reused else time.monotonic() - began))
        say(f"shards: {made.path}")


@app.command()
def train(
    recipe: Recipe,
    overrides: Overrides = None,
    until: Annotated[
        str | None, typer.Option(help="Stop with a checkpoint after so many tokens, such as 250B.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="As --until, in steps.", min=1)] = None,
    allow: Allow = None,
    supersede: Annotated[bool, typer.Option("--supersede", hidden=True, help="As --allow supersede.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say what it takes: memory, data, disk, time.")
    ] = False,
    gpu: Annotated[str | None, typer.Option(help="With --dry-run: a GPU such as H100, for the time.")] = None,
    mfu: Annotated[
        float, typer.Option(help="With --dry-run: the share of its peak that is reached.", min=0.01, max=1)
    ] = 0.4,
    bandwidth: Annotated[
        float, typer.Option(help="With --dry-run: GB/s that a GPU sends to other machines.", min=0.1)
    ] = 50,
) -> None:
    """Train a recipe's model through its milestones with torchrun, from the newest checkpoint on.

    Ctrl-C saves a checkpoint and stops. The recipe's launcher says where it trains; `torchrun -m train RECIPE` is the
    trainer alone.

    Examples:

    openlm train demo --until 400K

    openlm train pretrain_1b --dry-run --gpu H100
    """
    from openlm_pipeline.pipeline import training as training_stage
    from openlm_pipeline.runs.launch import Measured, MilestoneReached, StepSkipped

    experiment, home = _load(recipe, overrides)
    if dry_run:
        from openlm_pipeline.runs.dry_run import describe

        cost = describe(experiment, experiment.launcher.world_size, gpu, mfu, home, bandwidth=bandwidth * 1e9)
        for line in cost.lines():
            say(line)
        return
    limit = experiment.limit(_tokens(until) if until else None, steps)
    allowed = parse_allow(allow) | ({"supersede"} if supersede else frozenset())
    for event in training_stage.train(experiment, home, limit, say, allow=allowed):
        if isinstance(event, Measured):
            say(progress_line(event.record))
        elif isinstance(event, StepSkipped):
            say(f"step {event.record['step']} left out: {event.record['skipped']}")
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
        named = {k.rpartition("/")[2]: v for k, v in record.items() if k.startswith("validation_loss/")}
        parts = [f"{name} {loss:.4f}" for name, loss in named.items()] or [f"{record['validation_loss']:.4f}"]
        return start + f"validation loss {', '.join(parts)}"
    return start + f"loss {record['loss']:.4f}, {record['tokens_per_second']:,.0f} tokens/s"


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
def recipes(
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON schema of a recipe, for editors.")] = False,
) -> None:
    """List the recipes: those that ship, those in the folders of OPENLM_RECIPES and those in OPENLM_HOME/recipes.

    A recipe that does not load is listed with its error.
    """
    from openlm_pipeline.experiments.load import SCHEMA
    from openlm_pipeline.pipeline.recipes import load_recipes

    if schema:
        typer.echo(SCHEMA.read_text(), nl=False)
        return
    loaded, not_loaded = load_recipes()
    table = Table("name", "milestones", "description", box=None)
    for experiment in loaded:
        milestones = " ".join(format_tokens(t) for t in experiment.milestones)
        table.add_row(experiment.name, milestones, printable(experiment.description))
    console.print(table)
    for name, error in not_loaded.items():
        say(f"not loaded: {name}: {error}")


def with_repeated_options(arguments: list[str]) -> list[str]:
    """`--input-files a b` as make_2048.py takes it, or a shell makes it of a glob: one option per file."""
    out: list[str] = []
    many = False
    for argument in arguments:
        if argument == "--input-files":
            many = True
        elif argument.startswith("-") or not many:
            many = False
            out.append(argument)
        else:
            out += ["--input-files", argument]
    return out


def main() -> None:
    """Run the command; expected errors, Ctrl-C and SIGTERM end it with one message and an exit code."""
    errors = Console(stderr=True, highlight=False, soft_wrap=True)
    before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(_ENDED))
    try:
        app(with_repeated_options(sys.argv[1:]))
    except OpenLMError as e:
        errors.print(f"error: {e}", markup=False)
        sys.exit(e.exit_code)
    except OSError as e:
        if (said := disk_trouble(e)) is None:
            raise
        errors.print(f"error: {said}", markup=False)
        sys.exit(OpenLMError.exit_code)
    except SystemExit as e:
        if e.code in (_INTERRUPTED, _ENDED):
            errors.print(_STOPPED)
        raise
    except ImportError as e:
        if not isinstance(e.__cause__, (KeyboardInterrupt, SystemExit)):
            raise
        errors.print(_STOPPED)  # while a compiled module was being imported, which makes its own error of it
        sys.exit(_INTERRUPTED if isinstance(e.__cause__, KeyboardInterrupt) else _ENDED)
    finally:
        signal.signal(signal.SIGTERM, before)
        freeze()  # at its end the interpreter looks for cycles, through all of torch where a command needed it


if __name__ == "__main__":
    main()
