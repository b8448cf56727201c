"""A tiny run: shards written directly, a model of two layers, and the trainer in this process.

What tests of the trainer and of run folders share.
"""

import contextlib
import signal
from collections.abc import Collection, Iterator
from pathlib import Path

import numpy as np
import torch

from openlm_pipeline.checkpoints.folders import list_checkpoints
from openlm_pipeline.experiments import Experiment, load_experiment
from openlm_pipeline.runs.folder import RunFolder
from openlm_pipeline.shards.format import SampleFormat, write_shard
from openlm_pipeline.shards.manifest import DATASET, ShardEntry, finish_dataset, write_manifest
from openlm_pipeline.shards.opening import open_dataset
from openlm_pipeline.shards.sums import write_sums
from openlm_pipeline.storage.files import write_json
from openlm_pipeline.storage.home import Home
from train.distributed import leave_process_group
from train.loop import Outcome
from train.run import run_training
from train.signals import STOP_SIGNALS

REPOSITORY = Path(__file__).parents[1]
BATCH = 256
RECIPE = """
name: small
tokenizer: {{name: bytes, train: {{vocab_size: 260}}}}
seq_len: 32
sources: [{{name: text, files: ["raw/text/*.jsonl"], weight: 3}}, {{name: code, files: ["raw/code/*.jsonl"]}}]
validation: {{source: {{name: heldout, files: ["raw/heldout/*.jsonl"]}}, max_samples: 21}}
model: {{hidden_dim: 32, n_layers: 2, n_heads: 2, vocab_size: 260}}
training: {{global_batch: {batch}, lr: 1.0e-2, schedule: constant, warmup: 1280, z_loss: 1.0e-4}}
milestones: {milestones}
execution: {{log_every: 1}}
"""


def write_dataset(
    home: Home,
    name: str,
    num_samples: int,
    *,
    seed: int,
    vocab_size: int = 260,
    sums: bool = True,
    seq_len: int = 32,
    tokenizer_sha256: str = "0" * 64,
    distinct: int | None = None,
) -> None:
    """Shards of seeded text-like ids: each id is followed by one of few, so that a model can learn them.

    Args:
        sums: of the samples; the first release wrote none.
        distinct: different samples, which are repeated in turn; by default all are.
    """
    rng = np.random.default_rng(seed)
    samples = (np.cumsum(rng.integers(1, 4, (num_samples, seq_len + 1)), axis=1) % 251).astype(np.uint16)
    samples = samples[np.arange(num_samples) % (distinct or num_samples)]
    folder, sample_format = home.shards(name, "v1"), SampleFormat(seq_len + 1, "uint16")
    halves = np.array_split(samples, 2)
    entries = []
    for n, (half, first) in enumerate(zip(halves, (0, len(halves[0])))):
        sums_sha256 = write_sums(folder / f"{n:08d}.sums", half) if sums else None
        made = write_shard(folder / f"{n:08d}.tar", half, first, sample_format)
        entries.append(ShardEntry(shard=f"{n:08d}", source=name, sums_sha256=sums_sha256, **made))
    tokenizer = {"name": "bytes", "sha256": tokenizer_sha256, "vocab_size": vocab_size}
    info = {"name": name, "version": "v1", "tokenizer": tokenizer, "eot_id": 0, "seq_len": seq_len, "dtype": "uint16"}
    if sums:
        finish_dataset(folder, entries, info)
    else:
        write_json(folder / DATASET, info)
        write_manifest(folder, entries)


def train_here(experiment: Experiment, home: Home, *, allow: Collection[str] = (), until: int | None = None) -> Outcome:
    """Train in this process, as a world of one thread, and leave no trace in it.

    Args:
        until: tokens; by default the last milestone.
    """
    with as_trainer():
        try:
            return run_training(experiment, home, until or experiment.milestones[-1], allow=allow)
        finally:
            leave_process_group()


@contextlib.contextmanager
def as_trainer() -> Iterator[None]:
    """One thread, as torchrun sets it, so that sums are the same here and in its workers; and signals as they were."""
    handlers = {s: signal.getsignal(s) for s in STOP_SIGNALS}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        for number, handler in handlers.items():
            signal.signal(number, handler)


class SmallRun:
    """A home with shards and the recipe of a run on them."""

    def __init__(self, root: Path, steps: tuple[int, ...]) -> None:
        self.home = Home(root / "home")
        self.recipe = root / "small.yaml"
        self.recipe.parent.mkdir(parents=True, exist_ok=True)
        self.recipe.write_text(RECIPE.format(batch=BATCH, milestones=[s * BATCH for s in steps]))
        for seed, (name, size) in enumerate({"text": 301, "code": 67, "heldout": 40}.items()):
            write_dataset(self.home, name, size, seed=seed)

    @property
    def run(self) -> RunFolder:
        return RunFolder(self.home.run("small", "v1"))

    def experiment(self, *overrides: str) -> Experiment:
        return load_experiment(str(self.recipe), overrides)

    def train(self, *overrides: str, allow: Collection[str] = ()) -> None:
        """Train to the last milestone in this process."""
        train_here(self.experiment(*overrides), self.home, allow=allow)

    @property
    def log_file(self) -> Path:
        """What is printed by a torchrun that trains this run."""
        return self.recipe.parent / "torchrun.log"

    def log(self) -> str:
        return self.log_file.read_text()

    def losses(self) -> dict[int, float]:
        return {r["step"]: r["loss"] for r in self.run.read_metrics() if "loss" in r}

    def validation_losses(self) -> dict[int, float]:
        return {r["step"]: r["validation_loss"] for r in self.run.read_metrics() if "validation_loss" in r}

    def steps_on_disk(self) -> dict[int, str | None]:
        """Step -> milestone label of each complete checkpoint."""
        found = list_checkpoints(self.run.checkpoints, self.run.fingerprint, warn=lambda message: None)
        return {c.step: c.milestone for c in found}


class SameSamples(SmallRun):
    """A run of one step without validation whose samples are all the same, so that its first loss is known; `model` is
    the recipe's."""

    def __init__(self, root: Path, model: str) -> None:
        super().__init__(root, (1,))
        write_dataset(self.home, "same", 40, seed=7, distinct=1)
        text = self.recipe.read_text()
        old = text[text.index("sources:") : text.index("training:")]
        self.recipe.write_text(text.replace(old, f'sources: [{{name: same, files: ["x"]}}]\nmodel: {model}\n'))

    @property
    def sample(self) -> torch.Tensor:
        """Its ids, int64."""
        (sample,) = open_dataset(self.experiment().datasets()[0], self.home).gather(np.arange(1))
        return torch.from_numpy(sample.astype(np.int64))

    def first_loss(self, name: str, *overrides: str) -> float:
        """Train another run of it."""
        train_here(self.experiment(f"name={name}", *overrides), self.home)
        records = RunFolder(self.home.run(name, "v1")).read_metrics()
        return next(r["loss"] for r in records if "loss" in r)
