"""`openlm ui`: the Dagster UI on this machine, from any folder."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

from openlm_pipeline.runs.programs import SAFE_PATH, dagster_home, programs_folder

MODULE = "openlm_pipeline.cli.definitions"


def dagster_environment() -> dict[str, str]:
    """The environment of Dagster's own commands: its home, made where it is missing.

    The definitions are named by `-m`: with DAGSTER_MODULE_NAME the webserver of `dagster dev` never answers.
    """
    named = {**os.environ, **SAFE_PATH, "DAGSTER_HOME": str(dagster_home())}
    named.pop("DAGSTER_MODULE_NAME", None)
    return named


def definitions_option() -> list[str]:
    """What names our definitions to Dagster's commands; in a checkout's root folder pyproject.toml does."""
    return [] if programs_folder() == Path.cwd() else ["-m", MODULE]


def ui(
    port: Annotated[int, typer.Option(help="Port on this machine.", envvar="PORT", min=1, max=65535)] = 3000,
    host: Annotated[str, typer.Option(help="Address to listen on: who reaches it may start runs.")] = "127.0.0.1",
) -> None:
    """Start the Dagster UI and its daemon, until Ctrl-C.

    Dagster's own state is in DAGSTER_HOME, or else in `.dagster` of the working folder where there is one, or else in
    `dagster` under OPENLM_HOME. With DAGSTER_HOME set to that folder, `dagster job launch -m
    openlm_pipeline.cli.definitions -j demo` launches a job from any folder.

    Example: openlm ui --port 3001
    """
    command = [sys.executable, "-m", "dagster", "dev", *definitions_option(), "--host", host, "--port", str(port)]
    raise typer.Exit(subprocess.run(command, env=dagster_environment(), check=False).returncode)
