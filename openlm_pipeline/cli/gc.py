"""`openlm gc`: say what may be removed from the home and what could then no longer be done; remove it with --apply."""

from typing import Annotated

import typer
from rich.console import Console


def gc(
    apply: Annotated[bool, typer.Option("--apply", help="Remove it. Without this nothing is touched.")] = False,
    superseded_days: Annotated[
        float, typer.Option(help="Keep what was set aside (*.superseded-N) for so many days.", min=0)
    ] = 30,
    unfinished_hours: Annotated[
        float, typer.Option(help="Keep unfinished files that were written to within so many hours.", min=0)
    ] = 24,
    superseded_runs: Annotated[
        bool, typer.Option("--superseded-runs", help="Runs that were set aside go with their milestones.")
    ] = False,
    token_streams: Annotated[
        bool, typer.Option("--token-streams", help="Token streams go whose shards are complete.")
    ] = False,
) -> None:
    """Plan what can be removed from OPENLM_HOME: why, how much it is, and what it costs; --apply removes it.

    Milestones, raw files, shards that a run was trained on and everything a running process has locked always stay.
    Nothing behind a symbolic link is touched, nor the copy in a store where OPENLM_HOME is a URL.

    Example: openlm gc --superseded-days 7
    """
    from openlm_pipeline.pipeline.retention import Retention, plan_gc
    from openlm_pipeline.pipeline.retention import apply as remove
    from openlm_pipeline.storage.home import Home
    from openlm_pipeline.units import format_bytes

    console = Console(highlight=False, soft_wrap=True)

    def say(line: str) -> None:
        console.print(line, markup=False)

    home = Home.from_env()
    plan = plan_gc(home, Retention(superseded_days, unfinished_hours, superseded_runs, token_streams))
    root = home.root.resolve()
    for entry in plan.entries:
        say(f"{entry.path.relative_to(root)}  {format_bytes(entry.bytes)}")
        say(f"  why: {entry.why}")
        say(f"  without it: {entry.consequence}")
    for kept in plan.kept:
        say(f"{kept.path.relative_to(root)}  {format_bytes(kept.bytes)} stays: {kept.why}")
    total = f"{format_bytes(plan.bytes)} in {len(plan.entries)} places below {root}"
    if not apply:
        say(f"{total} can go; nothing was removed. With --apply it is.")
        return
    say(f"removing {total}")
    say(f"{format_bytes(remove(plan, say))} removed")
