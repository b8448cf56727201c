"""A suite made ready before any model is asked: all files read and checked, all prompts built."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from tokenizers import Tokenizer

from openlm_pipeline.evaluation.rules.prefix import answers_that_say_nothing
from openlm_pipeline.evaluation.suite import HARNESS_VERSION, WHOLE, IclTask, Part, Suite, task_name
from openlm_pipeline.evaluation.task_files import TaskFile, read_task_file
from openlm_pipeline.evaluation.tasks import Item, build_items
from openlm_pipeline.fingerprint import Tree, fingerprint
from openlm_pipeline.registry import RULES
from openlm_pipeline.result import Say
from openlm_pipeline.storage.home import Home


@dataclass(frozen=True)
class PreparedTask:
    """A task with one number of few-shot rows."""

    task: IclTask
    num_fewshot: int
    file: TaskFile
    items: tuple[Item, ...]
    """In file order."""
    identity: Tree
    """All that its scores depend on, but the model."""
    warnings: tuple[str, ...] = ()
    """What its items say of it that a reader must know, one sentence each."""

    @property
    def name(self) -> str:
        return task_name(self.task.label, self.num_fewshot)


def prepare_suite(
    suite: Suite,
    home: Home,
    tokenizer: Tokenizer,
    max_seq_len: int,
    report: Say,
    *,
    as_foundry: bool = False,
    part: Part = WHOLE,
) -> list[PreparedTask]:
    """Read every file of a suite and build every prompt; the tasks in their order.

    Args:
        as_foundry: see `build_items`.
        part: says which rows, where not all; its tasks are those of the suite.
        max_seq_len: longest sequence in tokens, where a task does not say.

    Raises:
        MissingInputError: a task's file is missing.
        DataError: a row is malformed, or cannot be scored within the length; file and line are named.
    """
    tokenizer_digest = fingerprint({"tokenizer": tokenizer.to_str()})
    tasks: list[PreparedTask] = []
    for task in suite.icl_tasks:
        file = read_task_file(task, home)
        rows = part.rows([row.category for row in file.rows])
        for k in task.num_fewshot:
            items = tuple(build_items(task, file, k, tokenizer, max_seq_len, as_foundry=as_foundry, rows=rows))
            identity: Tree = {
                "harness_version": HARNESS_VERSION,
                "tokenizer": tokenizer_digest,
                "task_file_sha256": file.sha256,
                "task": task.settings(),
                "num_fewshot": k,
                "max_seq_len": task.max_seq_len or max_seq_len,
            }
            if rows is not None:
                identity["rows"] = part.limit
            warnings = tuple(_warnings(task, k, file, items))
            for warning in warnings:
                report(f"{task_name(task.label, k)}: {warning}")
            tasks.append(PreparedTask(task, k, file, items, identity, warnings))
    return tasks


def _warnings(task: IclTask, k: int, file: TaskFile, items: Sequence[Item]) -> Iterator[str]:
    if task.published_sha256 not in (None, file.sha256):
        yield f"{file.path} is not the file that published scores are of (its sha256 is {file.sha256[:12]}...)"
    if len(items) < len(file.rows):
        yield f"{len(items)} of its {len(file.rows)} rows alone were scored"
    if cut := [i for i in items if i.cut_tokens]:
        most = max(i.cut_tokens for i in cut)
        yield f"{len(cut)} of {len(items)} contexts are too long for the model and lose up to {most} tokens on the left"
    if fewer := [i for i in items if i.shots < k]:
        yield f"{len(fewer)} of {len(items)} items have {min(i.shots for i in fewer)} solved rows before them, not {k}"
    if RULES[task.rule].generates:
        for item in items:
            if nothing := answers_that_say_nothing(item.answers, task):
                yield (
                    f"line {file.rows[item.index].line} of {file.path} has the answer {nothing[0]!r}, of which "
                    "normalisation leaves nothing: LLM Foundry's rule takes any text as right"
                )
