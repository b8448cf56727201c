"""Score a suite by LLM Foundry itself: the same table as the native scorer's, item by item.

Task files are read and checked here first. LLM Foundry then makes its own prompts of them; each is compared with the
one prepared here, and its accuracies with the mean of the items, so that a table of this backend says what LLM Foundry
did and nothing else. Finished tasks are kept on disk like the native scorer's, and never taken for them.
"""

import json
import math
import shutil
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from openlm_pipeline.errors import ConfigError, DataError
from openlm_pipeline.evaluation.foundry.environment import FoundryError, find_foundry_python, run_foundry
from openlm_pipeline.evaluation.foundry.prompt_digest import prompt_digest
from openlm_pipeline.evaluation.parallel import scoring_processes
from openlm_pipeline.evaluation.prepare import PreparedTask, prepare_suite
from openlm_pipeline.evaluation.results import (
    Generated,
    RequestScore,
    Rows,
    SuiteResult,
    collect_results,
    generation_row,
    item_row,
)
from openlm_pipeline.evaluation.suite import Suite
from openlm_pipeline.evaluation.task_files import located
from openlm_pipeline.evaluation.tasks import Item
from openlm_pipeline.result import Say
from openlm_pipeline.storage.files import sha256_file
from openlm_pipeline.storage.home import Home
from openlm_pipeline.storage.remote import open_remote

_TASK_TYPES = ("multiple_choice", "schema", "language_modeling", "generation_task_with_answers")
"""Those that LLM Foundry has."""
_BATCH_ROWS = 8
_PROGRESS_SECONDS = 5.0
_MODEL_CODE = Path(__file__).parents[2] / "checkpoints" / "hf"
_COPIED = (
    *("label", "icl_task_type", "continuation_delimiter", "example_delimiter", "prompt_string"),
    *("question_prelimiter", "has_categories", "fewshot_random_seed", "strip_dataset"),
)
_TOLERANCE = 1e-6
"""For an accuracy, which LLM Foundry divides in fp32."""


def score_suite_with_foundry(
    model_folder: Path,
    suite: Suite,
    home: Home,
    out_dir: Path,
    context: Mapping[str, Any],
    *,
    tokenizer: Tokenizer,
    checkpoint_digest: str,
    max_seq_len: int,
    python: Path | None = None,
    report: Say = lambda line: None,
) -> SuiteResult:
    """Have LLM Foundry score every task of a suite, in fp32, on a GPU where its environment sees one.

    It pads every row to `max_seq_len`, so give tasks their own where that matters. Code of the model's folder is run
    only if it is what `export_huggingface` puts there. What LLM Foundry prints is in `out_dir/foundry.log`.

    Args:
        model_folder: a Hugging Face folder with its tokenizer.
        context, checkpoint_digest, max_seq_len: as for `score_suite`.
        tokenizer: the folder's; prompts are prepared with it and compared.
        python: LLM Foundry's interpreter; by default `find_foundry_python()`.

    Raises:
        MissingInputError: a task's file or LLM Foundry's environment is missing.
        DataError: a row is malformed, or cannot be scored within the length, or the model gives NaN.
        ConfigError: a task type or rule that LLM Foundry does not have.
        FoundryError: LLM Foundry failed, or its prompts or accuracies are not those of the items.
    """
    for task in suite.icl_tasks:
        if task.icl_task_type not in _TASK_TYPES or task.scored_by is not None:
            what = f"scored_by {task.scored_by}" if task.scored_by else f"icl_task_type {task.icl_task_type}"
            raise ConfigError(
                f"task {task.label} has {what}, which LLM Foundry does not know; set evaluation.backend=native"
            )
    processes = scoring_processes()
    prepared = prepare_suite(suite, home, tokenizer, max_seq_len, report, as_foundry=True)

    def score(tasks: Sequence[PreparedTask]) -> Iterator[Rows]:
        with closing(_run(tasks, model_folder, home, out_dir, tokenizer, max_seq_len, python, report)) as found:
            for _ in tasks:
                yield processes.from_first(lambda: next(found))

    subject = {"checkpoint": checkpoint_digest, "backend": "foundry"}
    return collect_results(prepared, suite, out_dir, context, subject, score, processes, report)


def _run(
    tasks: Sequence[PreparedTask],
    model_folder: Path,
    home: Home,
    out_dir: Path,
    tokenizer: Tokenizer,
    max_seq_len: int,
    python: Path | None,
    report: Say,
) -> Iterator[Rows]:
    """The rows of each task, as one process of LLM Foundry finishes them."""
    python = python or find_foundry_python()
    out_dir.mkdir(parents=True, exist_ok=True)
    work = out_dir.absolute() / "foundry.tmp"
    shutil.rmtree(work, ignore_errors=True)  # a killed run's
    work.mkdir()
    try:
        jobs = {}
        for number, t in enumerate(tasks):
            path, output = work / f"task-{number}.jsonl", work / f"items-{number}.jsonl"
            with open_remote(located(t.task, home), "task file") as source, path.open("wb") as target:
                shutil.copyfileobj(source, target)
            if sha256_file(path) != t.file.sha256:
                raise DataError(f"{t.file.path} was changed while it was being scored; score again")
            jobs[t.name] = {"name": t.name, "icl_task": _foundry_task(t, path, max_seq_len), "output": str(output)}
        job = {
            "model": str(model_folder.absolute()),
            "trust_remote_code": has_only_our_code(model_folder),
            "max_seq_len": max_seq_len,
            "batch_size": _BATCH_ROWS,
            "tasks": list(jobs.values()),
        }
        by_name, told = {t.name: t for t in tasks}, -math.inf
        report(f"LLM Foundry starts; its output is in {out_dir / 'foundry.log'}")
        with closing(run_foundry(python, job, work, out_dir / "foundry.log", torch.get_num_threads())) as documents:
            for said in documents:
                name = said["task"]
                if "metrics" not in said:
                    if said["items"] == said["of"] or time.monotonic() > told + _PROGRESS_SECONDS:
                        report(f"{name}: {said['items']} of {said['of']} items, by LLM Foundry")
                        told = time.monotonic()
                    continue
                with Path(jobs[name]["output"]).open() as f:
                    rows = _rows(by_name[name], [json.loads(line) for line in f], tokenizer)
                _check_accuracies(by_name[name], rows, said["metrics"])
                yield rows
    finally:
        shutil.rmtree(work, ignore_errors=True)


def has_only_our_code(folder: Path) -> bool:
    """Whether the folder has Python files, and they are those that an export puts there: only then they may be run."""
    ours = {path.name: path.read_bytes() for path in _MODEL_CODE.glob("*.py")}
    found = list(folder.rglob("*.py"))
    return bool(found) and all(ours.get(path.name) == path.read_bytes() for path in found)


def _foundry_task(t: PreparedTask, path: Path, max_seq_len: int) -> dict[str, Any]:
    """The task as LLM Foundry's YAML has it."""
    task = t.task
    fields = {name: getattr(task, name) for name in _COPIED} | {
        "dataset_uri": str(path),
        "num_fewshot": [t.num_fewshot],
        "metric_names": [task.metric],
        "max_seq_len": task.max_seq_len or max_seq_len,
        "batch_size": task.batch_size or _BATCH_ROWS,
    }
    if task.rule == "prefix":
        most = task.generation_kwargs.max_new_tokens
        fields |= {
            "cot_delimiter": task.cot_delimiter,
            "do_normalization": task.do_normalization,
            "early_stopping_criteria": list(task.early_stopping_criteria),
            # Greedy, whatever the model's generation_config.json says.
            "generation_kwargs": {"do_sample": False} | ({"max_new_tokens": most} if most else {}),
        }
    return fields


def _asked(item: Item) -> list:
    if item.generation is not None:
        return [item.generation.context_ids, item.generation.max_new_tokens]
    return [[r.context_ids, r.continuation_ids] for r in item.requests]


def _rows(t: PreparedTask, results: Sequence[Mapping[str, Any]], tokenizer: Tokenizer) -> Rows:
    """Table rows in file order. LLM Foundry's own choice and verdict stand in them, not ours from its numbers."""
    if len(results) != len(t.items):
        raise FoundryError(f"{t.name}: LLM Foundry scored {len(results)} items, {t.file.path} has {len(t.items)}")
    by_category = sorted(t.items, key=lambda item: item.category or "")  # in file order within one
    rows: dict[int, dict[str, Any]] = {}
    for item, result in zip(by_category, results):
        if result["prompt_digest"] != prompt_digest(_asked(item)):
            raise FoundryError(
                f"{t.file.path}, line {t.file.rows[item.index].line} (task {t.name}): LLM Foundry's prompt is not the "
                "one prepared here; is the tokenizer that of the model's folder?"
            )
        rows[item.index] = _row(t, item, result, tokenizer)
    return [rows[i] for i in range(len(rows))]


def _row(t: PreparedTask, item: Item, result: Mapping[str, Any], tokenizer: Tokenizer) -> dict[str, Any]:
    correct = {"correct": result["correct"]}
    if item.generation is not None:
        written = _written(result["generated"], result["written_ids"], item.generation.stop, tokenizer)
        return generation_row(t.task, t.num_fewshot, item, written) | correct
    means = result["cross_entropies"]
    if not all(map(math.isfinite, means)):
        raise DataError("the model gives a log-probability that is not finite; its weights are not usable")
    scores = [RequestScore(-mean * n, n, result["correct"]) for mean, n in zip(means, result["num_tokens"])]
    row = item_row(t.task, t.num_fewshot, item, scores) | correct
    return row if t.task.rule == "argmax" else row | {"choice_mean": result["choice"]}


def _written(text: str, ids: Sequence[int], stops: Sequence[str], tokenizer: Tokenizer) -> Generated:
    """The text up to the first stop; LLM Foundry continues until all texts of a batch have theirs."""
    ends = [at for stop in stops if (at := text.find(stop)) >= 0]
    if not ends:
        return Generated(text, len(ids))
    needed = next(n for n in range(1, len(ids) + 1) if any(s in tokenizer.decode(ids[:n]) for s in stops))
    return Generated(text[: min(ends)], needed)


def _check_accuracies(t: PreparedTask, rows: Rows, metrics: Mapping[str, float]) -> None:
    """Compare LLM Foundry's accuracies, one per category, with the means of the items."""
    groups: dict[str, list[bool]] = defaultdict(list)
    for row in rows:
        category = f"/{row['category']}" if row["category"] else ""
        groups[f"metrics/{t.name}{category}/{t.task.metric}"].append(row["correct"])
    means = {key: sum(group) / len(group) for key, group in groups.items()}
    for key in sorted(means.keys() | metrics.keys()):
        mean, theirs = means.get(key, math.nan), metrics.get(key, math.nan)
        if not abs(mean - theirs) < _TOLERANCE:  # NaN fails too
            raise FoundryError(f"LLM Foundry says {key} {theirs}, and the mean of its items is {mean}")
