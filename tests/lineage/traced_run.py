"""A run from raw files to checkpoints, in seconds: what the tests of traces and of conservation share."""

import json
import shutil
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from commands import Ended, openlm
from small_run import train_here

from openlm_pipeline.experiments import Experiment, load_experiment
from openlm_pipeline.fingerprint import Tree
from openlm_pipeline.lineage.run_order import RunOrder
from openlm_pipeline.lineage.trace import Trace
from openlm_pipeline.pipeline import data as data_stages
from openlm_pipeline.pipeline.overview import find_run
from openlm_pipeline.pools import DaskSettings
from openlm_pipeline.runs.folder import RunFolder
from openlm_pipeline.shards.opening import open_dataset
from openlm_pipeline.storage.home import Home
from train.data import Batches

BATCH = 96
"""Tokens: six samples of 16."""
PLANTED = "The seven lanterns of Kitezh were lit at noon."
RECIPE = """
name: {name}
tokenizer: {{name: bpe, train: {{vocab_size: 400}}}}
seq_len: 16
samples_per_shard: 64
sources:
  - {{name: text, files: ["raw/text/*.jsonl"], weight: 3, max_bad_fraction: 0.2}}
  - {{name: code, files: ["raw/code/*.jsonl"]}}
model: {{hidden_dim: 8, n_layers: 1, n_heads: 1, vocab_size: 400}}
training: {{global_batch: 96, lr: 1.0e-3, schedule: constant}}
milestones: [{middle}, {last}]
execution: {{log_every: 1}}
"""
WORDS = (
    "a",
    "fox",
    "and",
    "the",
    "dog",
    "went",
    "over",
    "some",
    "old hill",
    "to",
    "see;",
    "where",
    "你好",
    "é",
    "x = 1\n",
)


def record(number: int) -> str:
    """A text of a few to a hundred words."""
    rng = np.random.default_rng(number)
    return f"{number}: " + " ".join(rng.choice(WORDS, int(rng.integers(1, 100))))


@dataclass
class TracedRun:
    """A home with raw files, shards and a recipe."""

    root: Path
    name: str = "small"
    recipe: Path = field(init=False)

    def __post_init__(self) -> None:
        self.home = Home(self.root / "home")
        self.recipe = self.root / "recipes" / f"{self.name}.yaml"

    @classmethod
    def make(cls, root: Path, steps: tuple[int, int] = (40, 80)) -> "TracedRun":
        """A run with two sources of text, whose samples come several times in it; nothing is trained yet."""
        made = cls(root)
        made.recipe.parent.mkdir(parents=True)
        made.recipe.write_text(RECIPE.format(name="small", middle=steps[0] * BATCH, last=steps[1] * BATCH))
        for folder, files in {"text": {"a": range(40), "b": range(100, 130)}, "code": {"c": range(200, 230)}}.items():
            for name, numbers in files.items():
                made.write(f"{folder}/{name}.jsonl", [record(n) for n in numbers])
        lines = made.raw("text/b.jsonl").read_text().splitlines()
        lines[7] = '{"no": "text"}'
        lines[9] = json.dumps({"text": record(5000) + " " + PLANTED + " " + record(5001)})
        made.raw("text/b.jsonl").write_text("\n".join([*lines[:3], "", *lines[3:]]) + "\n")
        return made

    def raw(self, name: str) -> Path:
        return self.home.root / "raw" / name

    def write(self, name: str, texts: Iterable[str]) -> None:
        self.raw(name).parent.mkdir(parents=True, exist_ok=True)
        self.raw(name).write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts))

    def experiment(self, *overrides: str) -> Experiment:
        return load_experiment(str(self.recipe), overrides)

    def pack(self, *overrides: str) -> "TracedRun":
        """Tokenizer and shards."""
        experiment, pools = self.experiment(*overrides), DaskSettings(workers=1).pool
        data_stages.ensure_tokenizer(experiment, self.home, lambda line: None)
        for dataset in experiment.datasets():
            files, _ = data_stages.tokenize(dataset, self.home, pools, lambda line: None)
            data_stages.make_shards(dataset, files, self.home, pools, lambda line: None)
        return self

    def train(self, *overrides: str, until: int | None = None) -> RunFolder:
        """Train up to so many steps, or to the end."""
        experiment = self.experiment(*overrides)
        train_here(experiment, self.home, until=until and until * experiment.training.global_batch)
        return RunFolder(self.home.run(experiment.name, experiment.version))

    def copy(self, to: Path) -> "TracedRun":
        shutil.copytree(self.root, to, dirs_exist_ok=True)
        return TracedRun(to, self.name)

    def trace(self, name: str = "small") -> Trace:
        return Trace(RunOrder(find_run(self.home, name), self.home))

    def openlm(self, *arguments: object) -> Ended:
        """The command, in this home."""
        variables = {"OPENLM_HOME": str(self.home.root), "OPENLM_RECIPES": str(self.recipe.parent), "COLUMNS": "300"}
        return openlm(*arguments, variables=variables)


def recorded(
    experiment: Experiment, home: Home, identity: Tree, first_step: int, last_step: int, processes: int = 1
) -> dict[tuple[str, int], list[tuple[int, int]]]:
    """(source, sample) -> (step, row) of each time that the loader of training reads it, its ranks one after the other.

    Steps are counted from 1, and both ends are read.
    """
    datasets = [open_dataset(d, home) for d in experiment.training_datasets()]
    names = [f"{d.name}/{d.version}" for d in experiment.training_datasets()]
    read: dict[tuple[str, int], list[tuple[int, int]]] = defaultdict(list)
    place: dict[bytes, tuple[str, int]] = {}
    for name, dataset in zip(names, datasets):
        for number in range(len(dataset)):
            place[dataset[number].astype(np.int64).tobytes()] = name, number
    for rank in range(processes):
        batches = Batches(experiment, datasets, rank, processes, identity)
        for step, batch in zip(range(first_step, last_step + 1), batches.from_step(first_step - 1)):
            for row, sample in enumerate(batch.numpy()):
                read[place[sample.tobytes()]].append((step, rank * batches.local_sequences + row))
    return {key: sorted(value) for key, value in read.items()}
