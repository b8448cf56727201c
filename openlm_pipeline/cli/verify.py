"""`openlm verify`: whether a release's links hold, or a run's records and tokens add up."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from openlm_pipeline.cli.runs import Version

_DIFFERS = 4


def verify(
    target: Annotated[str, typer.Argument(help="A folder that `openlm release` made; with --tokens a run.")],
    tokens: Annotated[
        bool, typer.Option("--tokens", help="Count a run's records and tokens, from the raw files to its last step.")
    ] = False,
    version: Version = None,
    deep: Annotated[bool, typer.Option("--deep", help="Score 50 random items again; needs the tasks' files.")] = False,
    replay: Annotated[
        int, typer.Option(metavar="STEPS", min=0, help="Train the last steps again; needs a checkpoint before them.")
    ] = 0,
    device: Annotated[str | None, typer.Option(help="To score on: cpu, cuda; default: a GPU, if there is one.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line.")] = False,
) -> None:
    """Follow each link of a release, from the card's numbers to the hashes of the raw files, and say what holds.

    Printed are: ok, what differs, or `not here` for what can't be looked at; where something differs the exit code is
    4. `python verify.py` in the folder does the first part without this package.

    With --tokens: no record and no token of a run was lost or counted twice. The records of each raw file, counted
    again where it is here, are quarantined, dropped or packed; packed tokens are in shards or left over; each sample
    was read once an epoch.

    Examples:

    openlm verify demo-release

    openlm verify demo-release --deep --replay 10

    openlm verify demo --tokens
    """
    if tokens:
        _count(target, version, as_json)
        return
    from openlm_pipeline.lineage.verify_release import DIFFERS, NOT_PROVED
    from openlm_pipeline.pipeline.release import examine
    from openlm_pipeline.storage.home import Home

    console, out = (Console(highlight=False, soft_wrap=True, stderr=stderr) for stderr in (as_json, False))
    worst = 0

    def say(line: str) -> None:
        console.print(line, markup=False)

    for link, status, what in examine(Path(target), Home.from_env(), say, deep=deep, steps=replay, device=device):
        worst = _DIFFERS if status == DIFFERS else worst
        record = {"link": link, "status": status, "what": what}
        line = json.dumps(record) if as_json else f"{status:8}  {link:30}  {what}"
        out.print(line, markup=False)
    say(NOT_PROVED)
    raise typer.Exit(worst)


def _count(run: str, version: str | None, as_json: bool) -> None:
    from openlm_pipeline.errors import DataError, printable
    from openlm_pipeline.pipeline.conservation import conserved
    from openlm_pipeline.pipeline.overview import find_run
    from openlm_pipeline.storage.home import Home

    out, home = Console(highlight=False, soft_wrap=True), Home.from_env()
    with Console(stderr=True).status("counting") as status:
        found = conserved(find_run(home, run, version), home, status.update)
    for equation in found:
        line = json.dumps({**asdict(equation), "state": equation.state}) if as_json else equation.line()
        out.print(printable(line), markup=False)
    if wrong := [equation.name for equation in found if equation.state == "differs"]:
        raise DataError(f"{len(wrong)} of {len(found)} equations do not hold: {', '.join(wrong[:5])}")
