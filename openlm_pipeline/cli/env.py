"""`openlm env`: what a bug report needs, in one paste."""

import json
from typing import Annotated

import typer


def env(as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False) -> None:
    """Print versions, machine, home and settings for a bug report; secrets only by name.

    Example: openlm env
    """
    from openlm_pipeline.runs.environment import environment

    found = environment()
    if as_json:
        typer.echo(json.dumps(found, indent=1))
        return
    for name, value in found.items():
        if isinstance(value, dict):
            typer.echo(f"{name}:")
            for part, what in value.items():
                typer.echo(f"  {part}: {what}")
        else:
            typer.echo(f"{name}: {'; '.join(value) if isinstance(value, list) else value}")
