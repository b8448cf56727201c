"""Looking at the items that a run's milestones were scored on: for `openlm items`, and for the report's second page."""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from openlm_pipeline.errors import ConfigError, DataError, MissingInputError
from openlm_pipeline.experiments import Experiment
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


def milestone_range(experiment: Experiment, text: str | None) -> list[str]:
    """Labels of the milestones from A to B for `A..B`, or of the one that is named, or all.

    Raises:
        ConfigError: the recipe has no such milestone.
    """
    names = {n: label for label, tokens in experiment.labelled_milestones() for n in (label, format_tokens(tokens))}
    labels = list(dict.fromkeys(names.values()))
    ends = text.split("..") if text else [labels[0], labels[-1]]
    if unknown := [end for end in ends if end not in names]:
        raise ConfigError(f"recipe {experiment.name} has no milestone {unknown[0]!r}; it has {', '.join(names)}")
    return labels[labels.index(names[ends[0]]) : labels.index(names[ends[-1]]) + 1]


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
        DataError: they were scored on other items than each other.
    """
    from openlm_pipeline.evaluation.scorecard import load_scorecard
    from openlm_pipeline.evaluation.suite import load_suite, task_name
    from openlm_pipeline.reports.items import of_task, picked, side_by_side

    suite = load_suite(evaluation_of(experiment).suite)
    known = [t.label for t in suite.icl_tasks]
    if task is not None and task not in known:
        near = difflib.get_close_matches(task, known, n=1)
        raise ConfigError(
            f"suite {suite.name} has no task {task!r}; "
            + (f"did you mean {near[0]!r}?" if near else f"it has {', '.join(known)}")
        )
    runs = [(t, k) for t, k in suite.runs() if task in (None, t.label) and shots in (None, k)]
    if not runs:
        raise ConfigError(f"task {task} has no {shots}-shot form in suite {suite.name}")
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
    found = []
    for one, k in runs:
        of_models = {title: t for title, table in tables.items() if (t := of_task(table, one.label, k)).num_rows}
        if not of_models:
            continue
        items = picked(of_models, only_flipped=only_flipped, by=by, limit=limit)
        file, problem = _file(one, home, hashes.get(task_name(one.label, k)))
        looked = side_by_side(one, k, of_models, items, file, problem)
        if whole_prompts and file:
            scored = dict(zip(*(next(iter(of_models.values()))[c].to_pylist() for c in ("item", "prompt_hash"))))
            looked = _with_prompts(looked, one, k, file, scored, experiment, home)
        found.append(looked)
    return found


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


def _with_prompts(
    found: "ItemsOfTask",
    task: "IclTask",
    k: int,
    file: "TaskFile",
    scored: Mapping[int, str],
    experiment: Experiment,
    home: Home,
) -> "ItemsOfTask":
    """With the whole prompts, made again by the run's tokenizer.

    Args:
        scored: item -> hash of the prompt that was scored.

    Raises:
        DataError: they are not those that were scored.
    """
    from openlm_pipeline.evaluation.tasks import build_items

    home.pull(home.tokenizer(experiment.tokenizer.name))
    tokenizer = load_reference(tokenizer_file(home.tokenizer(experiment.tokenizer.name)))
    built = build_items(task, file, k, tokenizer, experiment.seq_len, rows={i.item for i in found.items})
    if other := [i.index for i in built if scored[i.index] != i.prompt_hash]:
        raise DataError(f"item {other[0]} of {found.task} has another prompt now than it was scored with; score again")
    prompts = {i.index: (i.requests[i.gold] if i.requests else i.generation).context_ids for i in built}
    texts = {n: tokenizer.decode(list(ids), skip_special_tokens=False) for n, ids in prompts.items()}
    return replace(found, items=tuple(replace(item, prompt=texts[item.item]) for item in found.items))
