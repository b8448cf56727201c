"""The programs beside the library, `train` and `orchestration`, started from wherever they are installed.

Their folders have names that a user's working folder or environment may have as well. In a wheel they are below
`openlm_pipeline/programs`, so that no other program finds ours. Ours are started through this file, by its absolute
path, which puts their folder before all others that imports are looked for in, so that they find no other's.
"""

import os
import runpy
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import openlm_pipeline

_PACKAGE = Path(openlm_pipeline.__file__).parent
_PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
SAFE_PATH = {"PYTHONSAFEPATH": "1"}
"""Environment in which Python (3.11 and later) looks for no import in the working folder."""


def programs_folder() -> Path:
    """Where `train`, `assets` and `orchestration` are: in a wheel below the package, in a checkout beside it."""
    inside = _PACKAGE / "programs"
    return inside if inside.is_dir() else _PACKAGE.parent


def starting(name: str) -> list[str]:
    """What follows `python` in the command that starts the program `train` or `orchestration`."""
    return [str(Path(__file__).absolute()), name]


def attend(command: list[str]) -> int:
    """Run a program to its end, and pass on to it alone what asks this process to end; its exit code.

    In a session of its own, so that Ctrl-C does not reach the helpers of Dagster, which would print tracebacks.
    """
    with subprocess.Popen(command, start_new_session=True) as process:
        before = {number: signal.signal(number, lambda n, _: process.send_signal(n)) for number in _PASSED_ON}
        try:
            return process.wait()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def dying_with_us(command: list[str]) -> list[str]:
    """The command of a child that gets SIGTERM when this process dies, however it does (Linux, with `setpriv`)."""
    setpriv = shutil.which("setpriv")
    return [setpriv, "--pdeathsig", "TERM", "--", *command] if setpriv else command


def look_there_first() -> None:
    """Have this process import `train`, `assets` and `orchestration` from our folder, whatever else has these names."""
    folder = str(programs_folder())
    sys.path[:] = [folder, *(place for place in sys.path if place != folder)]


def dagster_home() -> Path:
    """`DAGSTER_HOME`, or else `.dagster` where a checkout has it, or the folder `dagster` of the home of artefacts.

    It gets our settings where it has none.
    """
    from openlm_pipeline.storage.files import write_text
    from openlm_pipeline.storage.home import Home

    here = Path(".dagster").absolute()
    beside = here if (here / "dagster.yaml").is_file() else Home.from_env().root / "dagster"
    folder = Path(os.environ.get("DAGSTER_HOME") or beside)
    if not (folder / "dagster.yaml").exists():
        write_text(folder / "dagster.yaml", (programs_folder() / "orchestration" / "dagster.yaml").read_text())
    return folder


if __name__ == "__main__":
    sys.path[:] = [place for place in sys.path if place not in ("", str(Path.cwd()), str(Path(__file__).parent))]
    look_there_first()
    del sys.argv[0]
    runpy.run_path(str(programs_folder() / sys.argv[0] / "__main__.py"), run_name="__main__")
