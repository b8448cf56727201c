"""Which samples each step of a run read, and which steps read a sample: for a run with all that it has of its parents.

Step s is that of the record s in `metrics.jsonl`: it read the samples (s - 1) * B .. s * B of the order, whatever the
number of processes and however often the run was resumed. A fork counts on from its parent's tokens, in its own batch.
"""

import itertools
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from openlm_pipeline.errors import ConfigError, IdentityError, MissingInputError
from openlm_pipeline.experiments import Dataset, Experiment
from openlm_pipeline.fingerprint import Tree
from openlm_pipeline.ordering.continued import is_same_mixture, order_record, recorded_order, seen
from openlm_pipeline.runs.folder import RunFolder
from openlm_pipeline.runs.parent import parent_folder
from openlm_pipeline.shards.opening import Opened, bring_and_open
from openlm_pipeline.storage.home import Home
from openlm_pipeline.units import format_tokens, parse_tokens


@dataclass(frozen=True)
class Source:
    """A dataset that the run, or a parent of it, was trained on."""

    name: str
    """Dataset and version."""
    dataset: Dataset
    opened: Opened
    content: str
    """The sha256 by which the run knows it."""


@dataclass(frozen=True)
class Stretch:
    """Consecutive samples of the order that one run read."""

    name: str
    """Of the run, and its version."""
    record: Mapping[str, Any]
    """Its `order_record`, but for where it ends."""
    seq_len: int
    begin: int
    """Its first sample."""
    end: int
    """After the last one that was trained on, or, of a parent, that the fork has of it."""
    batch: int | None
    """Samples of a step; None where the run's folder is gone."""
    left_out: Mapping[int, str]
    """Step -> why its samples were read, and not learned from."""

    def order_record(self, until: int) -> dict[str, Any]:
        return {**self.record, "samples": until}


@dataclass(frozen=True)
class Seen:
    """One time that a run read a sample."""

    run: str
    """Which run did: this one or a parent of it."""
    step: int | None
    """None where nobody knows any more how many samples a step of that run had."""
    row: int | None
    """In the step's batch, from 0."""
    sample: int
    """Number in its dataset."""
    time: int
    """1 for the first time that this sample was read: where each comes once an epoch, the epoch."""
    tokens_before: int
    """Trained on before that step."""
    left_out: str | None
    """Why it was not learned from; None where it was."""
    trained: bool
    """Whether the run came as far; else it will read it there."""


@dataclass(frozen=True)
class Batch:
    """What a step read."""

    stretch: Stretch
    step: int
    contents: list[str]
    """Of the dataset of each row."""
    samples: np.ndarray
    """int64[rows]: number in its dataset."""


class RunOrder:
    """The order of a run's samples, from its first parent on."""

    def __init__(self, run: RunFolder, home: Home) -> None:
        """
        Raises:
            MissingInputError: the run, or a dataset of it, is not there.
            IdentityError: a dataset is another than it was trained on.
        """
        self.run, self.home = run, home
        self.experiment = run.experiment()
        self.sources: dict[str, Source] = {}
        self.notes: list[str] = []
        """What can't be said, and why."""
        self.stretches = self._walk(run, None)

    @property
    def name(self) -> str:
        return self.last.name

    @property
    def last(self) -> Stretch:
        """The run's own samples."""
        return self.stretches[-1]

    @property
    def trained_tokens(self) -> int:
        return self.last.end * self.last.seq_len

    @cached_property
    def sizes(self) -> dict[str, np.ndarray]:
        return {content: source.opened.shard_sizes for content, source in self.sources.items()}

    def _walk(self, run: RunFolder, tokens: int | None) -> list[Stretch]:
        """
        Args:
            tokens: after which a fork left the run; None for the run itself.
        """
        identity, experiment = run.identity, run.experiment()
        name = f"{experiment.name}/{experiment.version}"
        try:
            self._open(experiment, identity)
        except (MissingInputError, IdentityError) as e:
            if tokens is None:
                raise
            self.notes.append(f"what {name} read before the fork can be told in part only: {e}")
        seq_len = identity["seq_len"]
        begin = identity["parent"]["tokens"] // seq_len if experiment.parent else 0
        end = (trained_tokens(run) if tokens is None else tokens) // seq_len
        batch = identity["training"]["global_batch"] // seq_len
        own = Stretch(name, order_record(identity, 0), seq_len, begin, max(begin, end), batch, left_out_steps(run))
        return [*(self._parents(experiment, identity, own) if experiment.parent else ()), own]

    def _parents(self, experiment: Experiment, identity: Tree, own: Stretch) -> list[Stretch]:
        folder, parent = parent_folder(experiment, self.home), identity["parent"]
        name = f"{parent['run']}/{parent.get('version', 'v1')}"
        why = f"is not in {self.home.root / 'runs'} any more"
        if (folder.path / "run.json").exists():
            if _is_parent(folder, parent, own):
                return self._walk(folder, parent["tokens"])
            why = f"in {self.home.root / 'runs'} is another run by now"
        self.notes.append(f"{name} {why}: its steps can't be numbered")
        record = parent.get("order", own.record)
        return [Stretch(name, record, own.seq_len, 0, own.begin, None, {})]

    def _open(self, experiment: Experiment, identity: Tree) -> None:
        recorded = {data["name"]: data["manifest_sha256"] for data in identity["data"]}
        for dataset in experiment.training_datasets():
            if recorded.get(dataset.name) in self.sources:
                continue
            opened = bring_and_open(dataset, self.home)
            if opened.version != recorded.get(dataset.name):
                raise IdentityError(
                    f"{opened.folder} is another dataset than {experiment.name} was trained on: bring that back"
                )
            name = f"{dataset.name}/{dataset.version}"
            if name in {source.name for source in self.sources.values()}:  # of which a parent had another part
                name = f"{name}, {len(opened):,} samples"
            self.sources[opened.version] = Source(name, dataset, opened, opened.version)

    def batch_of(self, step: int) -> Batch:
        """What a step read: of the run, or of a parent with the same batch before the run began.

        Raises:
            ConfigError: there is no such step, or its parent counts other steps.
        """
        own = self.last
        place = (step - 1) * own.batch
        stretch = next((s for s in self.stretches if s.begin <= place < s.end), own)
        if step < 1 or (stretch.batch, stretch.seq_len) != (own.batch, own.seq_len):
            why = "its first is 1"
            if step > 0 and len(self.stretches) > 1:
                parent = self.stretches[-2].name
                why = f"it begins after {own.begin // own.batch}, and before that are other steps: trace {parent}"
            raise ConfigError(f"{own.name} has no step {step}: {why}")
        contents = [data["manifest_sha256"] for data in stretch.record["data"]]
        if missing := [c for c in contents if c not in self.sources]:
            raise MissingInputError(f"{'; '.join(self.notes)}: a dataset of content {missing[0][:12]} is not there")
        order = recorded_order(stretch.order_record(place + own.batch), self.sizes)
        sources, samples = order.picks(place, own.batch)
        return Batch(stretch, step, [contents[source] for source in sources.tolist()], samples)

    def seen(self, content: str, samples: np.ndarray, until: int | None = None) -> Iterator[Seen]:
        """Each time that samples of a dataset were read, in order.

        Args:
            samples: numbers in the dataset, each once.
            until: tokens; by default all that the run was trained on. It may be more than that.
        """
        times: Counter[int] = Counter()
        for stretch in self.stretches:
            end = stretch.end if until is None else until // stretch.seq_len
            end = end if stretch is self.last else min(end, stretch.end)
            if end <= stretch.begin or content not in [data["manifest_sha256"] for data in stretch.record["data"]]:
                continue
            found = seen(stretch.order_record(end), self.sizes, content, samples)
            for index, place in zip(*(array.tolist() for array in found)):
                if place < stretch.begin:
                    continue  # a parent's, which has a stretch of its own
                sample = int(samples[index])
                times[sample] += 1
                step, row = divmod(place, stretch.batch) if stretch.batch else (None, None)
                yield Seen(
                    run=stretch.name,
                    step=None if step is None else step + 1,
                    row=row,
                    sample=sample,
                    time=times[sample],
                    tokens_before=(place if row is None else place - row) * stretch.seq_len,
                    left_out=None if step is None else stretch.left_out.get(step + 1),
                    trained=place < stretch.end,
                )

    def until(self, text: str | None) -> int | None:
        """Tokens that `text`, a milestone or a number of tokens, stands for, up to the end of a step.

        Raises:
            ConfigError: it is neither.
        """
        if text is None:
            return None
        labels = dict(self.experiment.labelled_milestones())
        try:
            tokens = labels.get(text) or parse_tokens(text)
        except ValueError as e:
            names = ", ".join(format_tokens(tokens) for tokens in labels.values())
            raise ConfigError(f"--until {text}: {e}; the milestones are {names}") from e
        return self.experiment.steps(tokens) * self.experiment.training.global_batch


def _is_parent(run: RunFolder, parent: Tree, own: Stretch) -> bool:
    """Whether a run is the one that a fork with the identity's `parent` began from, and no later one of its name."""
    if digests := [c.digest for c in run.saved() if c.tokens == parent["tokens"]]:
        return parent["checkpoint"] in digests
    before = order_record(run.identity, parent["tokens"])
    return before == parent["order"] if "order" in parent else is_same_mixture(before, own.record)


def trained_tokens(run: RunFolder) -> int:
    """How far a run came, by its metrics, its checkpoints and how its last process ended."""
    metrics = [record["tokens"] for record in run.last_records()[-1:]]
    outcome = [outcome["tokens"]] if (outcome := run.read_outcome()) else []
    return max([0, *metrics, *outcome, *(checkpoint.tokens for checkpoint in run.saved())])


def left_out_steps(run: RunFolder) -> dict[int, str]:
    """Step -> why it was left out, of the steps that stand: those that were trained again after a resume count so."""
    resumes = [(e["metrics_bytes"], e["step"]) for e in run.read_ledger() if e["event"] == "resume"]
    left_out: dict[int, str] = {}
    last = 0
    records = run.records(holding=b'"skipped":' if resumes else b"")
    for place, record in itertools.chain(records, [(math.inf, {})]):
        while resumes and resumes[0][0] <= place:
            last = resumes.pop(0)[1]
            left_out = {step: why for step, why in left_out.items() if step <= last}
        if "step" in record and record["step"] < last:  # set back, in a run of the first release, without a ledger
            left_out = {step: why for step, why in left_out.items() if step < record["step"]}
        last = record.get("step", last)
        if "skipped" in record:
            left_out[last] = record["skipped"]
    return left_out
