"""Where LLM Foundry's interpreter is, and a run of the script there: a child that dies with its parent."""

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from openlm_pipeline.errors import ConfigError, MissingInputError, OpenLMError
from openlm_pipeline.storage.files import write_json

VARIABLE = "OPENLM_FOUNDRY_PYTHON"
_DEFAULT = Path(".foundry/bin/python")
_RUNNER = Path(__file__).with_name("runner.py")
_SHOWN_LINES = 20


class FoundryError(OpenLMError):
    """LLM Foundry failed, or does not agree with what was prepared for it."""


def find_foundry_python() -> Path:
    """`OPENLM_FOUNDRY_PYTHON`, or the interpreter that `make foundry` makes below the working folder.

    Raises:
        ConfigError: the variable names no file.
        MissingInputError: neither is there.
    """
    if named := os.environ.get(VARIABLE):
        if not Path(named).is_file():
            raise ConfigError(f"{VARIABLE} is {named}, which does not exist")
        return Path(named).absolute()  # not resolved: a link's place says which environment it is
    if not _DEFAULT.is_file():
        raise MissingInputError(
            f"LLM Foundry's environment is not at {_DEFAULT.absolute()}: `make foundry` makes it; "
            f"{VARIABLE} names an interpreter elsewhere"
        )
    return _DEFAULT.absolute()


def _environment(work: Path, num_threads: int) -> dict[str, str]:
    """This process's, without what belongs to its own interpreter, and with nothing kept outside of `work`."""
    own = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "HF_HUB_CACHE", "HF_DATASETS_CACHE", "HF_MODULES_CACHE")
    distributed = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    kept = {k: v for k, v in os.environ.items() if k not in (*own, *distributed)}
    return kept | {"HF_HOME": str(work / "hf"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(num_threads)}


def run_foundry(python: Path, job: dict[str, Any], work: Path, log: Path, num_threads: int) -> Iterator[dict[str, Any]]:
    """Run the script on a job (see `runner`) in the folder `work`; yields what it says, as it says it.

    Whatever else it prints goes to `log`. Leaving the iterator ends the process.

    Raises:
        FoundryError: it failed or was killed; with the end of the log.
        ConfigError: the interpreter can't be started.
    """
    write_json(work / "job.json", job)
    command = [str(python), str(_RUNNER), str(work / "job.json")]
    with log.open("wb") as stderr:
        try:
            process = subprocess.Popen(
                command,
                cwd=work,
                env=_environment(work, num_threads),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
            )
        except OSError as e:
            raise ConfigError(f"LLM Foundry's interpreter {python} can't be started: {e}") from e
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if line.endswith("\n"):
                yield json.loads(line)
        code = process.wait()
    finally:
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            pipe.close()
    if code:
        how = f"was ended by signal {-code}" if code < 0 else f"failed with code {code}"
        if code == -9:
            how += " (which the system sends when memory runs out)"
        last = log.read_text(errors="replace").strip().splitlines()[-_SHOWN_LINES:]
        raise FoundryError(f"LLM Foundry {how}; {log} ends with\n" + "\n".join(last))
