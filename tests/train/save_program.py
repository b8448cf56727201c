"""A trainer that is killed while it saves, for a test that calls this in a process of its own."""

import os
import signal
import sys
from pathlib import Path
from typing import Any

from openlm_pipeline.experiments import load_experiment
from openlm_pipeline.storage.home import Home
from train.distributed import leave_process_group
from train.run import run_training

CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir"}
WRITING = os.O_WRONLY | os.O_RDWR


def run_and_die(recipe: str, root: Path, at: int, said: Path) -> None:
    """Train to the end in this process, and kill it just before change number `at` of the checkpoints folder.

    The change is written to the file `said`.
    """
    left = at
    experiment = load_experiment(recipe, [])
    folder = Home(root).run(experiment.name, experiment.version) / "checkpoints"

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal left
        if event == "open":
            name, _, flags = arguments
            if not isinstance(name, (str, os.PathLike)) or not flags & WRITING:
                return
        elif event in CHANGES:
            name = arguments[0]
        else:
            return
        path = Path(name)
        if not path.is_absolute() and isinstance(arguments[-1], int) and arguments[-1] >= 0 and event != "open":
            path = Path(f"/proc/self/fd/{arguments[-1]}").readlink() / path  # deleting a tree, in open folders
        if folder not in path.parents or (event == "os.mkdir" and path.exists()):
            return
        if left == 0:
            said.write_text(f"{event} {path.relative_to(folder)}")
            os.kill(os.getpid(), signal.SIGKILL)
        left -= 1

    sys.addaudithook(watch)
    run_training(experiment, Home(root), experiment.milestones[-1])
    leave_process_group()
