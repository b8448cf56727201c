"""Raw text to shards as a program of its own, for tests that end it or run two at once.

pipeline_program.py run ROOT             all stages on a LocalCluster of two worker processes
pipeline_program.py hold ROOT STAGE      all stages; in `tokenize` or `pack` it prints `held` and waits for a line
pipeline_program.py kill ROOT FOLDER     the pipeline below FOLDER/n, a copy of ROOT, is killed by SIGKILL just before
                                         its n-th change of the file system, for n from 0 until it ends before that;
                                         prints each change, then `done`
"""

import contextlib
import os
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet  # noqa: F401 - like the next one only to have it before forking
import tokenizers  # noqa: F401
from small_dataset import SmallDataset

from openlm_pipeline.pools import DaskSettings, Pool
from openlm_pipeline.result import Say

REFERENCE_ENGINE = {"execution": {"tokenizer_engine": "huggingface"}}
CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir"}


inline = DaskSettings(workers=1).pool


def hold(root: Path, stage: str) -> None:
    made = SmallDataset(root)

    @contextlib.contextmanager
    def held(report: Say) -> Iterator[Pool]:
        print("held", flush=True)
        sys.stdin.readline()
        with inline(report) as pool:
            yield pool

    made.tokenizer()
    files, _ = made.tokenize(held if stage == "tokenize" else inline)
    made.make_shards(files, held if stage == "pack" else inline)


def run_and_die(root: Path, at: int) -> None:
    """Run the stages in this process and kill it just before its change number `at` below the root."""
    left = at

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal left
        if event not in CHANGES:
            return
        path, folder = Path(arguments[0]), arguments[-1]
        if not path.is_absolute() and folder >= 0:  # deleting a tree names files relative to open folders
            path = Path(f"/proc/self/fd/{folder}").readlink() / path
        if root not in path.parents or path.exists() == (event == "os.mkdir"):  # elsewhere, or it changes nothing
            return
        if left == 0:
            print(event, path.relative_to(root), flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        left -= 1

    sys.addaudithook(watch)
    SmallDataset(root, REFERENCE_ENGINE).run(inline)
    print("done", flush=True)


def kill(root: Path, folder: Path) -> int:
    """The exit code of the process whose pipeline was not killed."""
    at, ended = 0, -signal.SIGKILL
    while ended == -signal.SIGKILL:
        shutil.copytree(root, folder / str(at))
        # No thread has been started in this process, so forking it is safe, and saves the imports.
        child = os.fork()
        if child == 0:
            run_and_die(folder / str(at), at)
            os._exit(0)
        ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        at += 1
    return ended


if __name__ == "__main__":
    command, *rest = sys.argv[1:]
    if command == "run":
        # The slower engine leaves time to end it.
        SmallDataset(Path(rest[0]), REFERENCE_ENGINE).run(DaskSettings(workers=2).pool)
    elif command == "hold":
        hold(Path(rest[0]), rest[1])
    else:
        sys.exit(kill(*map(Path, rest)))
