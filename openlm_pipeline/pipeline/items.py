"""Looking at the items that a run's milestones were scored on: for `openlm items`, and for the report's second page."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from openlm_pipeline.errors import ConfigError, DataError, MissingInputError
from openlm_pipeline.experiments import Experiment
from openlm_pipeline.pipeline.contamination import joined_if_scanned
from openlm_pipeline.pipeline.evaluation import CARD, evaluation_of, items_of
from openlm_pipeline.storage.home import Home
from openlm_pipeline.tokenizers.engine import load_reference
from openlm_pipeline.tokenizers.tokenizer import tokenizer_file
from openlm_pipeline.units import format_tokens

if TYPE_CHECKING:
    from openlm_pipeline.evaluation.suite import IclTask
    from openlm_pipeline.evaluation.task_files import TaskFile
    from openlm_pipeline.reports.items import ItemsOfTask

ITEMS_PER_TASK = 40
"""On the page beside a report, which shows the last so many milestones."""
MOST_MILESTONES = 6


def milestone_named(experiment: Experiment, name: str) -> str:
    """The label of a milestone, from it or from its tokens: `t0250B` from `250B`.

    Raises:
        ConfigError: the recipe has no such milestone.
    """
    names = {n: label for label, tokens in experiment.labelled_milestones() for n in (label, format_tokens(tokens))}
    if name not in names:
        raise ConfigError(f"recipe {experiment.name} has no milestone {name}; it has {', '.join(names)}")
    return names[name]


def milestone_range(experiment: Experiment, text: str | None) -> list[str]:
    """Labels of the milestones from A to B for `A..B`, or of the one that is named, or all."""
    labels = [label for label, _ in experiment.labelled_milestones()]
    ends = [labels.index(milestone_named(experiment, end)) for end in text.split("..")] if text else [0, len(labels)]
    return labels[ends[0] : ends[-1] + 1]


def look_at_items(
    experiment: Experiment,
    home: Home,
    labels: Sequence[str],
    *,
    task: str | None = None,
    shots: int | None = None,
    only_flipped: bool = False,
    by: str = "file",
    limit: int = ITEMS_PER_TASK,
    whole_prompts: bool = False,
) -> "list[ItemsOfTask]":
    """Items of each task of the recipe's suite, or of one, with the answers of those of the milestones that are scored.

    Raises:
        ConfigError: the suite has no such task.
        MissingInputError: none of the milestones is scored, or only one where two are to be compared.
        DataError: they were scored on other items than each other, or the whole prompts are others now.
    """
    import pyarrow as pa

    from openlm_pipeline.evaluation.scorecard import load_scorecard
    from openlm_pipeline.evaluation.suite import Part, load_suite, task_name
    from openlm_pipeline.reports.items import of_task, picked, side_by_side

    suite = Part((task,) if task else ()).of(load_suite(evaluation_of(experiment).suite))
    runs = [(t, k) for t, k in suite.runs() if shots in (None, k)]
    if not runs:
        raise ConfigError(f"suite {suite.name} has no such task with {shots} solved rows")
    titles = {label: format_tokens(tokens) for label, tokens in experiment.labelled_milestones()}
    folders = {titles[label]: home.scorecard(experiment.name, experiment.version, label) for label in labels}
    home.pull(home.root / "scorecards" / experiment.name / experiment.version)
    tables = {title: items for title, folder in folders.items() if (items := items_of(folder)) is not None}
    if not tables or (only_flipped and len(tables) < 2):
        missing = ", ".join(title for title in folders if title not in tables)
        raise MissingInputError(
            f"{missing} of {experiment.name} not scored in {home.root}; `openlm evaluate {experiment.name}` does it"
        )
    cards = [load_scorecard(folders[title] / CARD) for title in tables if (folders[title] / CARD).exists()]
    hashes = {t.name: t.task_file_sha256 for card in cards for t in card.tasks}
    scored = [label for label in labels if titles[label] in tables]
    known = _contamination(experiment, home, scored[-1])
    found = []
    for one, k in runs:
        of_models = {title: t for title, table in tables.items() if (t := of_task(table, one.label, k)).num_rows}
        if not of_models:
            continue
        items = picked(of_models, only_flipped=only_flipped, by=by, limit=limit)
        file, problem = _file(one, home, hashes.get(task_name(one.label, k)))
        looked = side_by_side(one, k, of_models, items, file, problem)
        if whole_prompts and file:
            first = next(iter(of_models.values()))
            scored = dict(zip(first["item"].to_pylist(), first["prompt_hash"].to_pylist()))
            prompts = _whole_prompts(one, k, file, {n: scored[n] for n in items}, experiment, home)
            looked = replace(looked, items=tuple(replace(i, prompt=prompts[i.item]) for i in looked.items))
        if known:
            every = pa.concat_tables([t.select(["item", "item_hash"]) for t in of_models.values()])
            hashes_of = dict(zip(every["item"].to_pylist(), every["item_hash"].to_pylist()))
            with_it = (replace(i, contamination=known.get((one.label, hashes_of[i.item]))) for i in looked.items)
            looked = replace(looked, items=tuple(with_it))
        found.append(looked)
    return found


_COLUMNS = ("verdict", "first_seen_tokens", "overlap", "times_seen")


def _contamination(experiment: Experiment, home: Home, label: str) -> dict[tuple[str, str], dict[str, Any]]:
    """(task, item_hash) -> what a milestone has read of the item; empty where its data was not scanned."""
    found, _ = joined_if_scanned(experiment, home, [label])
    rows = found[0].table.to_pylist() if found else []
    return {(row["task"], row["item_hash"]): {name: row[name] for name in _COLUMNS} for row in rows}


def wrong_items(experiment: Experiment, home: Home, label: str) -> list[dict[str, str]]:
    """Of each task an item that a milestone got wrong, one that the milestone before got right if there is any."""
    from openlm_pipeline.reports.items import clipped

    labels = [name for name, _ in experiment.labelled_milestones()]
    at = labels.index(label)
    rows = []
    for of in look_at_items(experiment, home, labels[max(0, at - 1) : at + 1]):
        wrong = [item for item in of.items if item.answers[-1].right is False]
        for item in sorted(wrong, key=lambda item: not item.flipped)[:1]:
            answer, options = item.answers[-1], item.options
            said = options[answer.chosen] if options and answer.chosen is not None else answer.generated
            right = options[item.gold] if options else " | ".join(item.accepted)
            texts = {"question": item.question, "answered": said or "", "right": right}
            rows.append(
                {"task": of.task, "item": str(item.item), "before": "right" if item.flipped else ""}
                | {name: clipped(text, 300) for name, text in texts.items()}
            )
    return rows


def _file(task: "IclTask", home: Home, sha256: str | None) -> "tuple[TaskFile | None, str]":
    """A task's file as it was scored, or why its texts cannot be shown."""
    from openlm_pipeline.evaluation.task_files import read_task_file

    try:
        file = read_task_file(task, home)
    except (MissingInputError, DataError) as e:
        return None, f"The texts cannot be shown: {e}"
    if sha256 not in (None, file.sha256):
        return None, f"The texts cannot be shown: {file.path} was changed since it was scored (sha256 {file.sha256})"
    return file, ""


def _whole_prompts(
    task: "IclTask", k: int, file: "TaskFile", scored: Mapping[int, str], experiment: Experiment, home: Home
) -> dict[int, str]:
    """Item -> its prompt, made again by the run's tokenizer; `scored` has the hashes of those that were scored."""
    from openlm_pipeline.evaluation.tasks import build_items

    home.pull(home.tokenizer(experiment.tokenizer.name))
    tokenizer = load_reference(tokenizer_file(home.tokenizer(experiment.tokenizer.name)))
    built = build_items(task, file, k, tokenizer, experiment.seq_len, rows=scored.keys())
    if other := [i.index for i in built if scored[i.index] != i.prompt_hash]:
        raise DataError(f"item {other[0]} of {task.label} has another prompt now than it was scored with; score again")
    asked = {i.index: i.requests[i.gold] if i.requests else i.generation for i in built}
    return {n: tokenizer.decode(list(a.context_ids), skip_special_tokens=False) for n, a in asked.items()}
