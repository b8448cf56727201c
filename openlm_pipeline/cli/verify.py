"""`openlm verify`: each link of a release, or of a run's tokens."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

_DIFFERS = 4


def verify(
    target: Annotated[str, typer.Argument(help="A folder that `openlm release` made.")],
    deep: Annotated[
        bool, typer.Option("--deep", help="Score 50 random items again, where the tasks' files are.")
    ] = False,
    replay: Annotated[
        int,
        typer.Option(metavar="STEPS", min=0, help="Train the last steps again, where a checkpoint before was kept."),
    ] = 0,
    device: Annotated[
        str | None, typer.Option(help="To score on: cpu, cuda; default: a GPU where there is one.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One object a line.")] = False,
) -> None:
    """Follow each link of a release, from the card's numbers to the hashes of the raw files, and say what holds.

    Printed are: ok, what differs, or `not here` for what can't be looked at. Exit code 4 where something differs.
    `python verify.py` in the folder does the first part without this package.

    Examples:

    openlm verify demo-release

    openlm verify demo-release --deep --replay 10
    """
    import json

    from openlm_pipeline.lineage.verify_release import DIFFERS, NOT_PROVED
    from openlm_pipeline.pipeline.release import examine
    from openlm_pipeline.storage.home import Home

    console, folder = Console(highlight=False, soft_wrap=True, stderr=as_json), Path(target)
    out, worst = Console(highlight=False, soft_wrap=True), 0

    def say(line: str) -> None:
        console.print(line, markup=False)

    found = examine(folder, Home.from_env(), say, deep=deep, steps=replay, device=device)
    for link, status, what in found:
        worst = _DIFFERS if status == DIFFERS else worst
        record = {"link": link, "status": status, "what": what}
        line = json.dumps(record) if as_json else f"{status:8}  {link:30}  {what}"
        out.print(line, markup=False)
    say(NOT_PROVED)
    raise typer.Exit(worst)
