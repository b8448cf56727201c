"""`openlm ui`: the Dagster UI on this machine, from any folder."""

import os
import subprocess
import sys
from typing import Annotated

import typer

from openlm_pipeline.runs.programs import SAFE_PATH, dagster_home

MODULE = "openlm_pipeline.cli.definitions"


def dagster_environment() -> dict[str, str]:
    """The environment of Dagster's own commands: its home, made where it is missing, and our definitions."""
    return {**os.environ, **SAFE_PATH, "DAGSTER_HOME": str(dagster_home()), "DAGSTER_MODULE_NAME": MODULE}


def ui(
    port: Annotated[int, typer.Option(help="Port on this machine.", envvar="PORT")] = 3000,
    host: Annotated[str, typer.Option(help="Address to listen on: who reaches it may start runs.")] = "127.0.0.1",
) -> None:
    """Start the Dagster UI and its daemon, until Ctrl-C.

    For Dagster's own commands elsewhere: export DAGSTER_MODULE_NAME=openlm_pipeline.cli.definitions and DAGSTER_HOME
    (by default `dagster` in OPENLM_HOME); then `dagster job launch -j demo` works in any folder.

    Example: openlm ui --port 3001
    """
    command = [sys.executable, "-m", "dagster", "dev", "--host", host, "--port", str(port)]
    raise typer.Exit(subprocess.run(command, env=dagster_environment(), check=False).returncode)
