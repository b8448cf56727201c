"""The chain from a milestone's scorecard to the raw files: every recorded hash on the way, compared with what is there.

scorecard -> items, task files -> checkpoint -> run (and its parents) -> shards -> tokenizer, raw files
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from openlm_pipeline.checkpoints.folders import Checkpoint, folder_name, read_checkpoint
from openlm_pipeline.corpus.discovery import discover
from openlm_pipeline.errors import ConfigError, DataError, IdentityError, MissingInputError
from openlm_pipeline.experiments import Dataset, Experiment
from openlm_pipeline.fingerprint import fingerprint
from openlm_pipeline.pipeline.evaluation import CARD
from openlm_pipeline.runs.folder import RunFolder
from openlm_pipeline.runs.parent import parent_folder
from openlm_pipeline.shards.dataset import ShardedDataset
from openlm_pipeline.shards.inspect import check_shards
from openlm_pipeline.shards.opening import bring_and_open, segments_of
from openlm_pipeline.storage.files import sha256_file
from openlm_pipeline.storage.home import Home
from openlm_pipeline.storage.remote import public, remote_size, sha256_url
from openlm_pipeline.tokenizers.tokenizer import tokenizer_file
from openlm_pipeline.units import milestone_label

if TYPE_CHECKING:
    from openlm_pipeline.evaluation.scorecard import Scorecard

State = Literal["ok", "differs", "not here"]


@dataclass(frozen=True)
class Link:
    """One thing that another names by its hash."""

    kind: str
    """`scorecard`, `items`, `task file`, `checkpoint`, `run`, `shards`, `tokenizer`, `raw file` and so on."""
    name: str
    state: State
    why: str = ""
    """What differs, or is not here; or what was compared."""


def links(run: RunFolder, label: str, home: Home, *, quick: bool = False) -> Iterator[Link]:
    """Each link of a milestone's chain, from its scores to the raw files.

    Args:
        quick: sizes of checkpoint, shards and raw files, not their hashes.

    Raises:
        DataError: `run.json` or `experiment.yaml` is damaged, without which nobody knows what belongs to the run.
    """
    experiment = run.experiment()
    path = run.checkpoints / folder_name(experiment.steps(dict(experiment.labelled_milestones())[label]))
    if experiment.evaluation:
        yield from _scores(experiment, home, label, path)
    yield from _of_run(run, experiment, home, path, label, quick, set())


def _link(kind: str, name: object, check: Callable[[], str | None]) -> Link:
    """The link that a check is of; it says what it compared, or raises."""
    try:
        return Link(kind, str(name), "ok", check() or "")
    except (MissingInputError, FileNotFoundError) as e:
        return Link(kind, str(name), "not here", str(e))
    except (DataError, IdentityError, ConfigError) as e:
        return Link(kind, str(name), "differs", str(e))


def _same(found: object, recorded: object, by: str) -> None:
    """
    Raises:
        DataError: they differ.
    """
    if found != recorded:
        raise DataError(f"has {str(found)[:12]}, and {by} says {str(recorded)[:12]}")


def _file(path: Path, sha256: str, by: str, size: int | None = None, *, quick: bool = False) -> str:
    """
    Raises:
        MissingInputError: it is not there.
        DataError: it is another than `by` says.
    """
    if not path.is_file():
        raise MissingInputError(f"{path} is missing")
    if size is not None:
        _same(f"{path.stat().st_size:,} bytes", f"{size:,} bytes", by)
    if quick and size is not None:
        return "size"
    _same(sha256_file(path), sha256, by)
    return "sha256"


def _scores(experiment: Experiment, home: Home, label: str, checkpoint: Path) -> Iterator[Link]:
    from openlm_pipeline.evaluation.scorecard import check_items, load_scorecard
    from openlm_pipeline.evaluation.scored import milestone_digest, scored_digest
    from openlm_pipeline.evaluation.suite import load_suite, task_name
    from openlm_pipeline.evaluation.task_files import read_task_file

    path = home.scorecard(experiment.name, experiment.version, label) / CARD
    home.pull(path.parent)
    cards: list[Scorecard] = []
    yield _link("scorecard", path, lambda: cards.append(load_scorecard(path)) or "its seal")
    for card in cards:
        yield _link("items", path.with_name("items.parquet"), lambda: check_items(path))
        hashes = {task_name(task.task, task.num_fewshot): task.task_file_sha256 for task in card.tasks}
        runs = load_suite(experiment.evaluation.suite).runs()
        tasks = {task.label: (task, hashes.get(task_name(task.label, k))) for task, k in runs}
        for task, sha256 in tasks.values():
            if sha256:
                read = partial(read_task_file, task, home)
                yield _link(
                    "task file", task.dataset_uri, lambda read=read, sha256=sha256: _same(read().sha256, sha256, CARD)
                )
        how = card.precision, card.average_of_weights

        def is_scored(card: "Scorecard" = card, how: tuple = how) -> str:
            there = read_checkpoint(checkpoint)
            if card.checkpoint_digest != scored_digest(there.digest, *how):  # as an earlier release recorded it
                _same(milestone_digest(there, *how), card.checkpoint_digest, CARD)
            return f"weights {card.checkpoint_digest[:12]}"

        yield _link("scored", f"{experiment.name}@{label}", is_scored)


def _of_run(
    run: RunFolder, experiment: Experiment, home: Home, path: Path, label: str, quick: bool, looked: set[str]
) -> Iterator[Link]:
    """Checkpoint, run, parents and data.

    Args:
        looked: datasets and raw files that were looked at already, to which those of this run are added.
    """
    name = f"{experiment.name}@{label}"
    found: list[Checkpoint] = []
    yield _link("checkpoint", path, lambda: found.append(read_checkpoint(path)) or "what it says of itself")
    for checkpoint in found:
        for file, recorded in checkpoint.files.items():
            args = checkpoint.path / file, recorded["sha256"], "checkpoint.json", recorded["bytes"]
            yield _link("checkpoint file", args[0], lambda args=args: _file(*args, quick=quick))
    yield (link := _link("run", run.path / "run.json", lambda: _same(fingerprint(run.identity), run.fingerprint, "it")))
    if link.state != "ok":
        return
    for checkpoint in found:
        made = checkpoint.run_fingerprint
        yield _link("run of checkpoint", name, lambda made=made: _same(run.fingerprint, made, "checkpoint.json"))
    contents = {data["name"]: data["manifest_sha256"] for data in run.identity["data"]}
    for dataset in experiment.training_datasets():
        if (content := contents[dataset.name]) not in looked:
            looked.add(content)
            yield from _data(dataset, home, content, quick)
    if experiment.parent:
        parent, recorded = parent_folder(experiment, home), run.identity["parent"]["checkpoint"]
        before = milestone_label(experiment.parent.milestone)
        where = [c for c in parent.saved() if c.milestone == before]
        its_name = f"{experiment.parent.run}@{before}"
        if not where:
            yield Link("parent", its_name, "not here", f"it is not in {parent.checkpoints}")
            return
        yield _link("parent", its_name, lambda: _same(where[0].digest, recorded, "run.json"))
        yield from _of_run(parent, parent.experiment(), home, where[0].path, before, quick, looked)


def _data(dataset: Dataset, home: Home, content: str, quick: bool) -> Iterator[Link]:
    """Shards, tokenizer and raw files of a dataset of the run."""
    name = f"{dataset.name}/{dataset.version}"
    opened = []
    yield (link := _link("dataset", name, lambda: opened.append(bring_and_open(dataset, home))))
    if link.state != "ok":
        return
    yield _link("content", name, lambda: _same(opened[0].version, content, "run.json"))
    tokenizer = opened[0].info["tokenizer"]
    if tokenizer["sha256"]:
        path = tokenizer_file(home.tokenizer(tokenizer["name"]))
        yield _link("tokenizer", path, lambda: _file(path, tokenizer["sha256"], "dataset.json"))
    inputs: dict[str, str] = {}
    for segment, _ in segments_of(opened[0]):
        yield from _shards(segment, quick)
        inputs |= {file: about["raw_sha256"] for file, about in segment.info.get("inputs", {}).items()}
    if not inputs:
        yield Link("raw files", name, "not here", "its shards are ready-made: nothing says what they were made from")
        return
    try:
        raw_files = {raw.name: raw for raw in discover(dataset, home)}
    except MissingInputError as e:
        yield Link("raw files", name, "not here", str(e))
        return
    for file, sha256 in inputs.items():
        raw = raw_files.get(file)
        if raw is None:
            yield Link("raw file", file, "not here", f"no file of {dataset.name} has this name any more")
        elif quick:
            yield _link("raw file", public(raw.url), lambda raw=raw: f"{remote_size(raw.url):,} bytes, not compared")
        else:
            args = sha256, "dataset.json"
            yield _link("raw file", public(raw.url), lambda raw=raw, args=args: _same(sha256_url(raw.url), *args))


def _shards(segment: ShardedDataset, quick: bool) -> Iterator[Link]:
    """One link for all files that are as recorded, and one for each that is not."""
    if not segment.entries[0].sha256:
        yield Link("shards", str(segment.folder), "not here", "they are OpenLM's, whose manifest has no hashes")
        return
    if segment.remote is not None and not segment.file(0).exists():
        yield Link(
            "shards", public(segment.remote), "not here", "they are in a store: whatever fetches one compares it"
        )
        return
    count = 0
    for file, problem in check_shards(segment.folder, quick=quick):
        count += problem is None
        if problem:
            missing = not (segment.folder / file).exists()
            yield Link("shard", str(segment.folder / file), "not here" if missing else "differs", problem)
    how = "size" if quick else "sha256"
    yield Link("shards", str(segment.folder), "ok", f"{count:,} lines of the manifest are right, by {how}")
