"""`openlm fsck`: compare all of a home with what was recorded when it was written."""

import json
from typing import Annotated

import typer
from rich.console import Console


def fsck(
    quick: Annotated[
        bool, typer.Option("--quick", help="Sizes and descriptions only, without reading large files.")
    ] = False,
    repair: Annotated[
        bool,
        typer.Option("--repair", help="Rename what is damaged to *.superseded-N, so that it can be made again."),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a finding.")] = False,
) -> None:
    """Check every file of OPENLM_HOME that has a recorded hash: raw files that were downloaded, tokenizers, token
    streams, shards, checkpoints, scorecards; and what should be there and is not.

    Each finding says what it harms and the command that mends it; with one, the exit code is 4. Nothing is changed
    without --repair, and nothing is deleted with it.

    Example: openlm fsck --quick
    """
    from openlm_pipeline.errors import DataError
    from openlm_pipeline.pipeline.fsck import Damage, check_home, set_aside_damaged
    from openlm_pipeline.storage.home import Home

    out, progress = Console(highlight=False, soft_wrap=True), Console(stderr=True)
    home, looked, damaged = Home.from_env(), 0, list[Damage]()
    with progress.status("looking", spinner="dots") as status:
        for path, damage in check_home(home, quick=quick):
            looked += 1
            status.update(f"{looked:,} looked at, {len(damaged):,} damaged; {path}")
            if damage is None:
                continue
            damaged.append(damage)
            if as_json:
                out.print(json.dumps({**vars(damage), "path": str(damage.path)}), markup=False)
            else:
                lines = (damage.what, f"  harms: {damage.harms}", f"  mend: {damage.mends}")
                out.print("\n".join(lines), markup=False)
    for moved in set_aside_damaged(damaged) if repair else []:
        progress.print(f"set aside: {moved}", markup=False)
    if damaged:
        raise DataError(f"{len(damaged):,} of {looked:,} things in {home.root} are damaged or missing")
    progress.print(f"all {looked:,} things in {home.root} are as they were written", markup=False)
