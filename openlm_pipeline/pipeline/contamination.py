"""Contamination of a recipe's evaluation: its datasets scanned for the suite's items, joined to a milestone.

Datasets are scanned once, see `lineage.contamination`. What is known of a milestone stands beside its scorecard, in
`contamination.parquet`, one row an item; the scorecard and its per-item table stay what they are.
"""

import json
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from openlm_pipeline.errors import DataError, MissingInputError, OpenLMError
from openlm_pipeline.experiments import Dataset, Experiment
from openlm_pipeline.fingerprint import Tree, fingerprint
from openlm_pipeline.ordering.continued import order_record
from openlm_pipeline.pipeline.data import dataset_versions
from openlm_pipeline.pipeline.evaluation import evaluation_of, items_of
from openlm_pipeline.pools import PoolFactory
from openlm_pipeline.result import Say, StageResult
from openlm_pipeline.runs.folder import RunFolder
from openlm_pipeline.runs.identity import run_identity
from openlm_pipeline.runs.parent import parent_folder, parent_identity
from openlm_pipeline.shards.opening import Opened, open_dataset, published_url
from openlm_pipeline.storage.files import write_text
from openlm_pipeline.storage.home import Home
from openlm_pipeline.tokenization.documents import record_offsets
from openlm_pipeline.units import format_tokens

if TYPE_CHECKING:
    import pyarrow as pa

    from openlm_pipeline.evaluation.suite import Suite
    from openlm_pipeline.lineage.contamination import ScanOf
    from openlm_pipeline.lineage.suite_windows import SuiteWindows
    from openlm_pipeline.reports.contamination import Contamination

FILE = "contamination.parquet"
DEFAULT_WINDOW = "50"
CONTAMINATED = "contaminated"
"""By which removed documents are counted."""


@dataclass(frozen=True)
class Joined:
    """What a run has read of a suite's items up to a milestone."""

    table: "pa.Table"
    """As `lineage.contamination.join` gives it."""
    facts: dict[str, Any]
    items: "pa.Table | None"
    """The per-item table of the milestone, where it is scored."""

    def by_task(self) -> list[dict[str, Any]]:
        """As `lineage.contamination.by_task`."""
        from openlm_pipeline.lineage.contamination import by_task

        return by_task(self.table, self.items)

    def seen(self) -> list[dict[str, Any]]:
        """The rows of items that were seen."""
        return [row for row in self.table.to_pylist() if row["first_seen_tokens"] is not None]

    def notes(self) -> list[str]:
        """What a reader must know, a sentence each."""
        from openlm_pipeline.lineage.windows import RULES

        facts, rule = self.facts, RULES[self.facts["window"]]
        said = [
            f"An item is seen if a window of {rule.size} {'words' if rule.words else 'letters and digits'} of its "
            "question, or of its end with the right answer, was read; overlap is the share of its windows that were."
        ]
        if facts["boilerplate_windows"]:
            said.append(f"{facts['boilerplate_windows']:,} windows of several items and many documents don't count.")
        if facts["left_out"]:
            said.append(f"{facts['left_out']:,} more occurrences of frequent windows are not in the times.")
        if facts["init_from"]:
            said.append(f"What the weights that it began with, {facts['init_from']}, have read is not known.")
        return said


def scan_of(dataset: Dataset, opened: Opened, suite: str, windows: "SuiteWindows", home: Home) -> "ScanOf":
    """The scan of an opened dataset; what of it is at the home's URL is brought here."""
    from openlm_pipeline.lineage.contamination import ScanOf, segments

    of = ScanOf(dataset, opened, suite, windows, home)
    for segment, _ in segments(opened):
        home.pull(of.folder(segment))
    return of


def scan_dataset(
    dataset: Dataset, suite_file: str, home: Home, pools: PoolFactory, report: Say, window: str = DEFAULT_WINDOW
) -> StageResult:
    """Look for a suite's items in the shards of a dataset that were not looked at yet, each a task of the pool.

    Raises:
        MissingInputError: the shards, the tokenizer or a task's file are not there.
        ConfigError: the samples are made up.
    """
    from openlm_pipeline.evaluation.suite import load_suite
    from openlm_pipeline.lineage.contamination import boilerplate, read_scan, scan, segments
    from openlm_pipeline.lineage.suite_windows import suite_windows
    from openlm_pipeline.lineage.windows import RULES

    suite = load_suite(suite_file)
    home.pull(home.tokenizer(dataset.tokenizer.name))
    if not dataset.source.shards and not published_url(dataset):
        home.pull(home.shards(dataset.name, dataset.version))
    windows = suite_windows(suite, home, RULES[window])
    of = scan_of(dataset, open_dataset(dataset, home), suite.name, windows, home)
    with ExitStack() as stack:
        for segment, _ in segments(of.opened):
            stack.enter_context(home.artefact(of.folder(segment)))
        scanned = scan(of, pools, report)
    found = read_scan(of)
    dropped = boilerplate(windows, [found])
    facts = {
        "occurrences": len(found.window),
        "windows_found": len(set(found.window.tolist())),
        "boilerplate_windows": len(dropped),
        "windows": len(windows.distinct[0]),
        "items": len(windows.row),
        "items_too_short": int((windows.counts().sum(1) == 0).sum()),
        "shards_scanned": scanned,
        "cpu_seconds": found.facts["seconds"],
        "tokens": found.facts["tokens"],
        "occurrences_not_kept": found.facts["left_out"],
    }
    report(
        f"{dataset.name}: {scanned} shards scanned, {len(of.shards()) - scanned} reused; {facts['windows_found']:,} "
        f"windows of {suite.name} stand in it {facts['occurrences']:,} times, {len(dropped):,} are boilerplate"
    )
    return StageResult(of.folder(segments(of.opened)[-1][0]), of.version, not scanned, facts)


def datasets_read(experiment: Experiment, home: Home, record: Mapping[str, Any]) -> dict[str, tuple[Dataset, Opened]]:
    """sha256 of its manifest -> each dataset that a run and its parents read, opened.

    Args:
        record: `order_record` of the run.

    Raises:
        MissingInputError: one is not there, or not any more as it was read.
    """
    wanted, part = set(), record
    while part is not None:
        wanted |= {d["manifest_sha256"] for d in part["data"]}
        part = part.get("before")
    found: dict[str, tuple[Dataset, Opened]] = {}
    one: Experiment | None = experiment
    while one is not None and not wanted <= found.keys():
        for dataset in one.training_datasets():
            opened = open_dataset(dataset, home)
            if opened.version in wanted:
                found.setdefault(opened.version, (dataset, opened))
        one = parent_folder(one, home).experiment() if one.parent else None
    if lost := wanted - found.keys():
        raise MissingInputError(
            f"{experiment.name} or a run that it continues read a dataset of content {min(lost)[:12]}, which is not "
            "there any more; what it holds of the items can't be told"
        )
    return found


def record_of(experiment: Experiment, home: Home, label: str) -> tuple[dict[str, Any], int]:
    """The order of a run up to a milestone, trained or still to be, and the milestone's tokens, whole steps."""
    run = RunFolder(home.run(experiment.name, experiment.version))
    home.pull(run.path)
    if (run.path / "run.json").exists():
        identity = run.identity
    else:
        parent = parent_identity(experiment, home)
        identity = run_identity(experiment, dataset_versions(experiment, home), parent)
    tokens = experiment.steps(dict(experiment.labelled_milestones())[label]) * experiment.training.global_batch
    return order_record(identity, tokens), tokens


def scan_recipe(
    experiment: Experiment, home: Home, pools: PoolFactory, report: Say, window: str = DEFAULT_WINDOW
) -> list[StageResult]:
    """Scan each dataset that the run of a recipe and its parents read, as far as it is not scanned."""
    suite = evaluation_of(experiment).suite
    label = [name for name, _ in experiment.labelled_milestones()][-1]
    datasets = datasets_read(experiment, home, record_of(experiment, home, label)[0])
    return [scan_dataset(d, suite, home, pools, report, window) for d, _ in datasets.values()]


def task_files_version(suite: "Suite", home: Home) -> str:
    """Hash of the hashes of a suite's task files.

    Raises:
        MissingInputError, DataError: one is not there, or damaged.
    """
    from openlm_pipeline.evaluation.task_files import read_task_file

    return fingerprint({task.label: read_task_file(task, home).sha256 for task in suite.icl_tasks})


def suite_of(experiment: Experiment) -> str:
    """Name of the suite of a recipe."""
    from openlm_pipeline.evaluation.suite import load_suite

    return load_suite(evaluation_of(experiment).suite).name


def suite_windows_of(experiment: Experiment, home: Home, window: str = DEFAULT_WINDOW) -> "SuiteWindows":
    """The windows that datasets were scanned for.

    Raises:
        MissingInputError: none was.
    """
    from openlm_pipeline.lineage.suite_windows import load_windows

    windows_identity(experiment, home, window)
    return load_windows(home.windows(suite_of(experiment), window))


def windows_identity(experiment: Experiment, home: Home, window: str) -> Tree:
    """What the windows that datasets were scanned for are made from.

    Raises:
        MissingInputError: none was scanned.
    """
    from openlm_pipeline.lineage.suite_windows import read_identity

    suite = suite_of(experiment)
    home.pull(folder := home.windows(suite, window))
    try:
        return read_identity(folder)
    except MissingInputError:
        raise MissingInputError(f"the data of {experiment.name} is {_not_scanned(experiment, suite)}") from None


def _not_scanned(experiment: Experiment, suite: str) -> str:
    return f"not scanned for the items of {suite}; `openlm contamination {experiment.name}` does it"


def joined(experiment: Experiment, home: Home, labels: Sequence[str], window: str = DEFAULT_WINDOW) -> list[Joined]:
    """What a run has read of the suite's items up to each milestone, or will have read up to one to come.

    Beside the scorecard of a milestone, where there is one, it is kept as `contamination.parquet`.

    Raises:
        MissingInputError: a dataset that the run or its parents read is not scanned, or not there.
    """
    from openlm_pipeline.lineage.contamination import join, read_scan
    from openlm_pipeline.storage.tables import write_table

    suite = suite_of(experiment)
    identity = windows_identity(experiment, home, window)
    record, _ = record_of(experiment, home, labels[-1])
    windows, found, sizes, made = None, {}, {}, []
    for label in labels:
        out = home.scorecard(experiment.name, experiment.version, label)
        items, tokens = items_of(out), record_of(experiment, home, label)[1]
        of = fingerprint({"windows": identity, "order": {**record, "samples": tokens // experiment.seq_len}})
        keeps = items is not None and window == DEFAULT_WINDOW
        if keeps and (kept := _kept(out / FILE, of)):
            made.append(Joined(*kept, items))
            continue
        if windows is None:
            windows = suite_windows_of(experiment, home, window)
            for version, (dataset, opened) in datasets_read(experiment, home, record).items():
                if (scan := read_scan(scan_of(dataset, opened, suite, windows, home))) is None:
                    raise MissingInputError(f"{dataset.name} is {_not_scanned(experiment, suite)}")
                found[version], sizes[version] = scan, opened.shard_sizes
        table, facts = join(windows, found, record, sizes, experiment.seq_len, tokens)
        facts |= {"milestone": label, "tokens": tokens, "window": window, "init_from": experiment.init_from, "of": of}
        made.append(Joined(table, facts, items))
        if keeps:
            with home.artefact(out):
                write_table(out / FILE, table, facts)
    return made


def _kept(path: Path, of: str) -> "tuple[pa.Table, dict[str, Any]] | None":
    """What is kept there, where it is of the same windows and order."""
    from openlm_pipeline.storage.tables import read_table

    try:
        table, facts = read_table(path)
    except (MissingInputError, DataError):
        return None  # it is made again
    return (table, facts) if facts["of"] == of else None


def joined_if_scanned(
    experiment: Experiment, home: Home, labels: Sequence[str], window: str = DEFAULT_WINDOW
) -> tuple[list[Joined], str]:
    """As `joined`; or nothing, and why it can't be told."""
    try:
        return joined(experiment, home, labels, window) if labels else [], ""
    except OpenLMError as e:
        return [], str(e)


def write_removals(experiment: Experiment, home: Home, path: Path, window: str = DEFAULT_WINDOW) -> dict[str, int]:
    """Write a list, for a source's `exclude`, of the documents of a recipe's datasets in which items stand.

    Returns:
        Source -> documents.

    Raises:
        MissingInputError: a dataset is not scanned, or where its records begin is not known any more.
    """
    from openlm_pipeline.lineage.contamination import boilerplate, documents_with, read_scan

    windows, suite = suite_windows_of(experiment, home, window), suite_of(experiment)
    scans = {d.name: scan_of(d, open_dataset(d, home), suite, windows, home) for d in experiment.training_datasets()}
    found = {name: read_scan(scan) for name, scan in scans.items()}
    if lacking := [name for name, one in found.items() if one is None]:
        raise MissingInputError(f"{lacking[0]} is {_not_scanned(experiment, suite)}")
    dropped, lines, counts = boilerplate(windows, list(found.values())), [], {}
    for name, scan in scans.items():
        documents = documents_with(scan, dropped)
        counts[name] = len(documents)
        offsets = _offsets(scan, home, documents)
        for (file, record), hashes in documents.items():
            items = np.unique(windows.item[np.isin(windows.hashes, hashes)]).tolist()
            names = [f"{windows.tasks[windows.task[i]]} {windows.row[i]}" for i in items]
            row = {"source": name, "file": file, "record": record, "offset": offsets[file, record]}
            lines.append(json.dumps({**row, "reason": CONTAMINATED, "items": names}) + "\n")
    write_text(path, "".join(lines))
    return counts


def _offsets(scan: "ScanOf", home: Home, documents: Collection[tuple[str, int]]) -> dict[tuple[str, int], int]:
    """Where in its raw file each document begins."""
    from openlm_pipeline.lineage.contamination import segments

    found: dict[tuple[str, int], int] = {}
    for file in sorted({file for file, _ in documents}):
        records = [record for of, record in documents if of == file]
        for segment, _ in segments(scan.opened):
            if file in segment.info["inputs"]:
                folder = home.tokenized(scan.dataset.name, segment.info["version"])
                known = record_offsets(folder, file, records)
                found |= {(file, record): at for record, at in known.items() if at is not None}
        if lost := [record for record in records if (file, record) not in found]:
            raise MissingInputError(
                f"{home.tokenized(scan.dataset.name, scan.dataset.version)} does not say any more where record "
                f"{lost[0]} of {file} begins; `openlm tokenize` makes it again"
            )
    return found


def for_report(experiment: Experiment, home: Home, labels: Sequence[str]) -> "tuple[Contamination | None, str]":
    """The tables of a report over its scored milestones, or why there are none."""
    from openlm_pipeline.reports.contamination import contamination

    found, why = joined_if_scanned(experiment, home, labels)
    if not found:
        return None, why
    rows = {format_tokens(dict(experiment.labelled_milestones())[j.facts["milestone"]]): j.by_task() for j in found}
    return contamination(rows, found[-1].seen(), found[-1].notes()), ""
