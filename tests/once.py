"""What is made once per run of the suite, and shared by the processes that run tests side by side."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock


def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that all processes of this run of the suite have."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


def made_once(tmp_path_factory: pytest.TempPathFactory, name: str, make: Callable[[Path], None]) -> Path:
    """The folder `name` that `make` filled in the first process that asked; the others wait for it.

    Tests work on copies of what is in it. Where making fails, the next that asks tries again, in a new folder.
    """
    shared = run_folder(tmp_path_factory) / "once"
    shared.mkdir(exist_ok=True)
    with FileLock(shared / f"{name}.lock"):
        mark = shared / f"{name}.done"
        if not mark.exists():
            folder = tmp_path_factory.mktemp(name)
            make(folder)
            mark.write_text(str(folder))
        return Path(mark.read_text())
