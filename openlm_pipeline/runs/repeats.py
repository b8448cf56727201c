"""What a run reads more than once: in an order with repeats, or as two datasets with the same content."""

import os
from collections.abc import Iterator, Mapping
from itertools import combinations

import numpy as np

from openlm_pipeline.corpus.discovery import RawFile, discover
from openlm_pipeline.errors import ConfigError, OpenLMError
from openlm_pipeline.experiments import Dataset, Experiment
from openlm_pipeline.ordering import order_of
from openlm_pipeline.ordering.samplings.openlm import ResampledOrder
from openlm_pipeline.result import Finding, refusal
from openlm_pipeline.runs.identity import run_identity
from openlm_pipeline.runs.parent import parent_folder, parent_identity
from openlm_pipeline.shards.opening import open_dataset
from openlm_pipeline.storage.home import Home
from openlm_pipeline.storage.remote import join, public
from openlm_pipeline.units import format_tokens

MANY_EPOCHS = 4
MAX_EPOCHS = 16
"""From here on repeated text is worth next to nothing (Muennighoff et al. 2023, https://arxiv.org/abs/2305.16264)."""

Content = dict[str, str]
"""What a dataset holds: real paths and hashes of raw files and shards, each with the name to say."""


def content_of(dataset: Dataset, home: Home, raw_files: list[RawFile]) -> Content:
    """The content of a dataset, as far as its raw files (of ready-made shards there are none) and its shards say it."""
    urls = {raw.name: raw.url for raw in raw_files}
    found = {os.path.realpath(url): public(url) for url in urls.values()}
    try:
        opened = open_dataset(dataset, home)
    except OpenLMError:  # not made yet, or whoever reads it says what is wrong
        return found
    if not (entries := getattr(opened, "entries", None)):
        return {opened.version: dataset.source.shards}
    made_from = opened.info.get("identity", {})
    if files := made_from.get("files"):
        return found | {version: public(urls.get(name, name)) for name, version in files.items()}
    where = home.resolve(dataset.source.shards or str(opened.folder))
    tars = made_from.get("shards") or [join(where, entry.tar) for entry in entries]
    found |= {os.path.realpath(tar): entry.tar for tar, entry in zip(tars, entries)}
    return found | {entry.sha256: entry.tar for entry in entries if entry.sha256}


def overlaps(experiment: Experiment, contents: Mapping[str, Content]) -> Iterator[Finding]:
    """Files that are in two datasets of a run."""

    def both(a: str, b: str) -> list[str]:
        return sorted({contents[a][key] for key in contents.get(a, {}).keys() & contents.get(b, {}).keys()})

    names = [d.name for d in experiment.datasets()]
    training, held_out = names[: len(experiment.sources)], names[len(experiment.sources) :]
    for name in training:
        if shared := sorted({file for other in held_out for file in both(other, name)}):
            yield Finding(
                "warning",
                f"{len(shared)} of the validation set's files are also in {name}, such as {shared[0]}: its loss says "
                "nothing of unseen text",
                "Take them out of the training source",
            )
    for a, b in combinations(training, 2):
        if shared := both(a, b):
            yield Finding(
                "warning",
                f"{len(shared)} files of {a} are also in {b}, such as {shared[0]}: each source reads them anew, "
                "whatever of others is left",
                "Name them in one source, with the weight of both",
            )


def read_by_parent(experiment: Experiment, home: Home, contents: Mapping[str, Content]) -> Iterator[Finding]:
    """Datasets of a fork that are others than its parent's, with files that the parent has read already."""
    if not experiment.parent or not (run := parent_folder(experiment, home)).experiment_file.exists():
        return
    parent, known = run.experiment(), {d["manifest_sha256"] for d in run.identity["data"]}
    theirs: dict[str, str] = {}
    for dataset in parent.training_datasets():
        try:
            theirs |= content_of(dataset, home, discover(dataset, home) if dataset.source.files else [])
        except OpenLMError:  # they are gone, and the fork need not have them
            continue
    for dataset in experiment.training_datasets():
        try:
            if open_dataset(dataset, home).version in known:
                continue
        except OpenLMError:  # not made yet, so it is none of the parent's
            pass
        own = contents.get(dataset.name, {})
        if shared := sorted({own[key] for key in own.keys() & theirs.keys()}):
            yield Finding(
                "warning",
                f"{len(shared)} files of {dataset.name}, such as {shared[0]}, were read by {parent.name} in another "
                f"dataset: {dataset.name} begins at its first sample, and repeats them while new text is left",
                "Keep the parent's dataset as it is, and give new files a source of their own",
            )


def repeated(experiment: Experiment, home: Home, until: int) -> Iterator[Finding]:
    """Samples that training up to `until` tokens sees again, by its order; datasets that are not made say nothing."""
    datasets, opened = experiment.training_datasets(), {}
    for dataset in datasets:
        try:
            opened[dataset.name] = open_dataset(dataset, home)
        except OpenLMError:  # whoever needs it says what is wrong with it
            continue
    identity = None
    if experiment.parent and len(opened) == len(datasets):
        try:
            versions = {name: data.version for name, data in opened.items()}
            identity = run_identity(experiment, versions, parent_identity(experiment, home))
        except OpenLMError:  # the parent is not there; the plan of the milestones says so
            pass
    absent = np.ones(1, np.int64)
    sizes = [opened[d.name].shard_sizes if d.name in opened else absent for d in datasets]
    try:
        order = order_of(experiment, sizes, identity)
    except ConfigError as e:
        yield Finding("refusal", str(e))
        return
    weights = sum(source.weight for source in experiment.sources)
    for source, dataset in enumerate(datasets):
        if dataset.name not in opened:
            continue
        own, number, taken = order.of_source(source)
        share, size = dataset.source.weight / weights, len(opened[dataset.name])
        samples = taken + int((until // experiment.seq_len - order.start) * share)
        tokens, epochs = size * experiment.seq_len, samples / size
        if epochs > MAX_EPOCHS:
            yield refusal(
                "repeat_data",
                f"{experiment.name} would see each text of {dataset.name} {epochs:,.0f} times: {format_tokens(until)} "
                f"tokens, of which {format_tokens(tokens, 3)} are there",
                "Add raw text, or lower the milestones",
            )
        elif epochs > MANY_EPOCHS:
            yield Finding("warning", f"{experiment.name} sees each text of {dataset.name} {epochs:.1f} times")
        if isinstance(own, ResampledOrder) and samples:
            again, never = own.coverage(number, samples)
            if again and never:
                yield Finding(
                    "warning",
                    f"the order of {dataset.name} is drawn with replacement (resampled): about {again:.0%} of it is "
                    f"read twice or more, and {never:.0%} never",
                    "training.sampling=permutation, or windowed, reads all of it before it repeats any",
                )
        if own is not order and type(own) is not type(getattr(order, "own", own)):
            yield Finding(
                "warning",
                f"{dataset.name} continues in its parent's order; training.sampling={experiment.training.sampling} "
                "holds for sources that the parent did not have",
            )
