"""A run from OpenLM's command line: LOGS/NAME with `params.txt` and `out.log` beside what every run has."""

import contextlib
import os
import sys
from collections.abc import Collection, Sequence
from typing import TextIO

from openlm_pipeline.storage.files import write_text
from openlm_pipeline.storage.home import Home
from train.openlm.flags import OpenLMRun, translate
from train.openlm.parser import parse


class _Log:
    """Standard output that also goes to `out.log`.

    The trainer prints first when the folder is its own, so not before that is a file made or changed there.
    """

    encoding = "utf-8"

    def __init__(self, out: TextIO, run: OpenLMRun) -> None:
        self.out, self.run = out, run
        self.file: TextIO | None = None

    def write(self, text: str) -> int:
        if self.file is None:
            write_text(self.run.run_path / "params.txt", self.run.params_text())
            self.file = (self.run.run_path / "out.log").open("a", encoding=self.encoding)
        self.file.write(text)
        return self.out.write(text)

    def flush(self) -> None:
        self.out.flush()
        if self.file is not None:
            self.file.flush()

    def isatty(self) -> bool:
        return self.out.isatty()


def train_openlm(arguments: Sequence[str], allow: Collection[str] = ()) -> None:
    """Train what OpenLM's flags stand for, in this process of those that torchrun started.

    Args:
        allow: consents, as in `run_training`.

    Raises:
        OpenLMError: what is wrong with a flag, the data, the folder or the run.
    """
    values = parse(arguments)
    world_size, local_world_size = (int(os.environ.get(name, 1)) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    home = Home.from_env()
    run = translate(values, home, world_size=world_size, local_world_size=local_world_size)
    if values.wandb_notes:
        os.environ["WANDB_NOTES"] = values.wandb_notes
    from train.run import run_training

    first = os.environ.get("RANK", "0") == "0"
    for note in run.notes if first else ():
        print(f"note: {note}", flush=True)
    with contextlib.redirect_stdout(_Log(sys.stdout, run)) if first else contextlib.nullcontext():
        until = run.experiment.milestones[-1]
        weights = run.initial_weights
        resumes = {"extend"} if values.resume == "latest" else set()  # with more epochs, as there
        run_training(
            run.experiment, home, until, allow={*allow, *resumes}, run_path=run.run_path, initial_weights=weights
        )
