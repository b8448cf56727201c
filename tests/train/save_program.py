"""A trainer that is killed while it saves, for a test: save_program.py RECIPE ROOT ROOT ...

The run below the n-th ROOT, n from 0, is killed by SIGKILL just before its n-th change of the checkpoints folder. Each
ROOT is a home with the same shards and a run that has more to train; prints the change, or `done` if the run ended.
"""

import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch._dynamo  # noqa: F401 - only to have it before forking

from openlm_pipeline.experiments import load_experiment
from openlm_pipeline.storage.home import Home
from train.distributed import leave_process_group
from train.run import run_training

CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir"}
WRITING = os.O_WRONLY | os.O_RDWR


def run_and_die(recipe: str, root: Path, at: int) -> None:
    """Train to the end in this process, and kill it just before change number `at` of the checkpoints folder."""
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
            print(event, path.relative_to(folder), flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        left -= 1

    sys.addaudithook(watch)
    run_training(experiment, Home(root), experiment.milestones[-1])
    leave_process_group()
    print("done", flush=True)


def main(recipe: str, roots: list[Path]) -> None:
    for at, root in enumerate(roots):
        # Nothing has been computed in this process, so it has no threads, and forking it saves the imports.
        child = os.fork()
        if child == 0:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            run_and_die(recipe, root, at)
            os._exit(0)
        if os.waitpid(child, 0)[1] == 0:
            break


if __name__ == "__main__":
    main(sys.argv[1], [Path(root) for root in sys.argv[2:]])
