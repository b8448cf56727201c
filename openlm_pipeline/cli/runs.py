"""`openlm runs`, `cost`, `logs` and `stop`: the runs of a home, whatever started them."""

import codecs
import json
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from openlm_pipeline.cli.options import Price
from openlm_pipeline.errors import printable

_console = Console(highlight=False, soft_wrap=True)
_tables = Console(highlight=False, soft_wrap=True, width=1000)
"""They are as wide as what stands in them, on a narrow terminal and in a file too."""
_COSTS = ("lost", "idle", "start")
_BLOCK_BYTES = 1 << 20
Run = Annotated[str, typer.Argument(metavar="RUN", help="Name of a run, or NAME/VERSION (`openlm runs`).")]
Version = Annotated[str | None, typer.Option(help="Of its versions; default: the one written to last.")]
AsJson = Annotated[bool, typer.Option("--json", help="As JSON, with all that is known.")]


def _say(line: str) -> None:
    _console.print(printable(line), markup=False)


def score_text(score: dict[str, Any] | None) -> str:
    """`0.412 ±0.013`; the longer side of the 95% interval."""
    if not score or score["value"] is None:
        return "incomplete" if score else ""
    value, low, high = score["value"], score["ci_low"], score["ci_high"]
    return f"{value:.3f}" + ("" if low is None or high is None else f" ±{max(high - value, value - low):.3f}")


def _money(time: dict[str, Any], price: float | None) -> str:
    return f"{time['gpu_hours'] * price:,.2f}" if time and price is not None else ""


def runs(
    all: Annotated[bool, typer.Option("--all", help="Also runs that were set aside.")] = False,
    price: Price = None,
    as_json: AsJson = False,
) -> None:
    """List the runs of OPENLM_HOME: state, tokens, loss, headline score and cost.

    `stopped`: the trainer is gone without a word, as after a kill. GPU-hours of a CPU are hours of its processes.

    Example: openlm runs --price 2.5
    """
    from openlm_pipeline.pipeline.overview import run_folders, summary
    from openlm_pipeline.storage.home import Home
    from openlm_pipeline.units import format_tokens

    home = Home.from_env()
    rows = [summary(home, run) for run in run_folders(home, superseded=all)]
    if as_json:
        typer.echo(json.dumps(rows, indent=1))
        return
    names = ("run", "version", "state", "tokens", "milestone", "loss", "score", "hours", "GPU-hours")
    table = Table(*names, *(["money"] if price is not None else []), box=None)
    for row in rows:
        line = [row["run"], row["version"], row["state"]]
        if "tokens" in row:
            spent = row["time"]
            seconds = spent.get("wall_seconds", spent.get("productive_seconds", 0) + spent.get("lost_seconds", 0))
            line += [f"{format_tokens(row['tokens'], 3)}/{format_tokens(row['target_tokens'])}", row["milestone"] or ""]
            line += ["" if row["loss"] is None else f"{row['loss']:.4f}", score_text(row["score"])]
            line += [f"{seconds / 3600:,.2f}", f"{spent['gpu_hours']:,.2f}"] if spent else ["", ""]
            line += [_money(spent, price)] if price is not None else []
        table.add_row(*line)
    _tables.print(table)
    for row in rows:
        if row["state"] in ("damaged", "failed", "queued"):
            _say(f"{row['run']} {row['version']}: {row['why']}")
    if not rows:
        _say(f"there is no run in {home.root / 'runs'} yet")


def cost(
    run: Annotated[str | None, typer.Argument(metavar="[RUN]", help="A run; default: all.")] = None,
    version: Version = None,
    price: Price = None,
    as_json: AsJson = False,
) -> None:
    """What runs took: GPU-hours, goodput, and the time that was lost or idle; of one run also by milestone, and what
    each kill, stop and failure cost.

    Goodput is the share of the trainers' time that went into steps which stand: not those trained again after a kill or
    left out, nor starting, saving and validating. Idle is the time between two trainers.

    Example: openlm cost demo --price 2.5
    """
    from openlm_pipeline.errors import OpenLMError
    from openlm_pipeline.pipeline.overview import find_run, run_folders
    from openlm_pipeline.runs import ledger
    from openlm_pipeline.storage.home import Home
    from openlm_pipeline.units import format_seconds

    home = Home.from_env()
    found: dict[str, dict[str, Any]] = {}
    interruptions: list[dict[str, Any]] = []
    for one in [find_run(home, run, version)] if run else run_folders(home):
        name = f"{one.path.parent.name}/{one.path.name}"
        try:
            history = ledger.History(one)
            milestones = history.of_milestones() if run else {}
            found |= {f"{name}@{label}": facts for label, facts in milestones.items()} | {name: history.facts()}
            interruptions = history.account().interruptions if run else []
        except OpenLMError as e:
            _say(f"{name} is left out: {e}")
    total = sum(facts.get("gpu_hours", 0.0) for name, facts in found.items() if "@" not in name)
    if as_json:
        of_one = {"interruptions": interruptions} if run else {}
        typer.echo(json.dumps({"price": price, "gpu_hours": total, "runs": found, **of_one}, indent=1))
        return
    columns = {
        "steps": "productive",
        "lost": "lost",
        "starts": "start",
        "saves": "save",
        "other": "other",
        "idle": "idle",
    }
    table = Table("run", "GPU-hours", *(["money"] if price is not None else []), "goodput", *columns, box=None)
    for name, facts in found.items():
        if not facts:
            table.add_row(name, "not recorded")
            continue
        seconds = [facts.get(f"{kind}_seconds") for kind in columns.values()]
        table.add_row(
            name,
            f"{facts['gpu_hours']:,.3f}",
            *([_money(facts, price)] if price is not None else []),
            f"{facts['goodput']:.1%}" if "goodput" in facts else "",
            *("not recorded" if s is None else format_seconds(s) for s in seconds),
        )
    _tables.print(table)
    for one in interruptions:
        cost = (f"{what} {format_seconds(one[f'{what}_seconds'])}" for what in _COSTS if one.get(f"{what}_seconds"))
        when = time.strftime("%Y-%m-%d %H:%M", time.localtime(one["time"]))
        _say(f"{when}  after step {one['step']:,}: {one['how']}, which cost {', '.join(cost)}")
    _say(f"in all {total:,.3f} GPU-hours" + (f", {total * price:,.2f} at {price:g} each" if price is not None else ""))


def stop(
    run: Run,
    version: Version = None,
    kill: Annotated[bool, typer.Option("--kill", help="If it has not ended in its grace: without saving.")] = False,
) -> None:
    """Have a run save and stop, whatever started it: this machine's torchrun, Slurm or Kubernetes.

    Afterwards the same launch resumes it. A run that is not running is left as it is (exit code 0).

    Example: openlm stop demo
    """
    from openlm_pipeline.pipeline.overview import experiment_of, find_run, state_of
    from openlm_pipeline.runs.launch import stop_run
    from openlm_pipeline.storage.home import Home
    from openlm_pipeline.units import format_tokens

    home = Home.from_env()
    folder = find_run(home, run, version)
    experiment = experiment_of(folder)
    if not stop_run(experiment, home, folder, _say, kill=kill):
        _say(f"{experiment.name} is not running: {state_of(experiment, home, folder)[0]}")
        return
    saved = folder.saved()
    at = f", saved at step {saved[-1].step:,} ({format_tokens(saved[-1].tokens)} tokens)" if saved else ""
    _say(f"{experiment.name} has stopped{at}; the same launch resumes it")


def logs(
    run: Run,
    version: Version = None,
    follow: Annotated[bool, typer.Option("-f", "--follow", help="Until the run ends, or Ctrl-C.")] = False,
    lines: Annotated[int, typer.Option("-n", "--lines", help="So many of the last lines.", min=0)] = 20,
    metrics: Annotated[bool, typer.Option("--metrics", help="Only the records of losses.")] = False,
) -> None:
    """Print the end of what the trainer of a run printed, or the records of its losses where that is in no file.

    Example: openlm logs demo -f
    """
    from openlm_pipeline.pipeline.overview import ALIVE, experiment_of, find_run, log_file, state_of
    from openlm_pipeline.runs.launch import launcher_of
    from openlm_pipeline.storage.home import Home

    home = Home.from_env()
    folder = find_run(home, run, version)
    experiment, log = experiment_of(folder), log_file(folder)
    if metrics or log is None or _is_older(log, folder.metrics_file):
        if not metrics:
            _say(launcher_of(experiment, home, folder).log_end(lines) or "its trainer printed to no file; its records:")
        log = folder.metrics_file
    place, decoder = _start_of_last_lines(log, lines), codecs.getincrementaldecoder("utf-8")("replace")
    while True:
        state, _ = state_of(experiment, home, folder)
        if log == folder.metrics_file:
            records, place = folder.new_metrics(place)
            for record in records:
                _say(_record_line(record))
        elif log.exists():
            with log.open("rb") as f:
                f.seek(place)
                while block := f.read(_BLOCK_BYTES):
                    _console.out(printable(decoder.decode(block)), end="", highlight=False)
                place = f.tell()
        if not follow or state not in ALIVE:
            return
        time.sleep(0.5 if state == "running" else 5)


def _is_older(log: Path, metrics: Path) -> bool:
    """Whether a log is an earlier trainer's: each record is printed as well as written."""
    return metrics.exists() and log.stat().st_mtime < metrics.stat().st_mtime - 60


def _start_of_last_lines(path: Path, lines: int) -> int:
    """The byte at which the last lines of a file begin."""
    if not path.exists():
        return 0
    with path.open("rb") as f:
        size = f.seek(0, 2)
        f.seek(max(0, size - 2000 * lines))
        end = f.read()
    return size - len(b"".join(end.splitlines(keepends=True)[-lines:])) if lines else size


def _record_line(record: dict[str, Any]) -> str:
    from openlm_pipeline.cli.main import progress_line

    return f"step {record['step']} left out: {record['skipped']}" if "skipped" in record else progress_line(record)
