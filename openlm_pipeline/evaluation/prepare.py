"""A suite made ready before any model is asked: all files read and checked, all prompts built."""

from dataclasses import dataclass

from tokenizers import Tokenizer

from openlm_pipeline.errors import DataError, MissingInputError
from openlm_pipeline.evaluation.suite import HARNESS_VERSION, IclTask, Suite, task_name
from openlm_pipeline.evaluation.task_files import TaskFile, read_task_file
from openlm_pipeline.evaluation.tasks import Item, build_items
from openlm_pipeline.fingerprint import Tree, fingerprint
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

    @property
    def name(self) -> str:
        return task_name(self.task.label, self.num_fewshot)


@dataclass(frozen=True)
class Prepared:
    """The tasks of a suite in its order, and those that cannot be scored."""

    tasks: tuple[PreparedTask, ...]
    not_run: dict[str, str]
    """Task -> why, where its file is missing; only with `tolerant`."""
    failed: dict[str, str]
    """Task -> why, where its file is broken; only with `tolerant`."""


def prepare_suite(
    suite: Suite, home: Home, tokenizer: Tokenizer, max_seq_len: int, tolerant: bool, report: Say
) -> Prepared:
    """Read every file of a suite and build every prompt.

    Args:
        max_seq_len: longest sequence in tokens, where a task does not say.
        tolerant: leave out a task whose file is missing or broken, and say so in the result, instead of raising.

    Raises:
        MissingInputError: a task's file is missing.
        DataError: a row is malformed, or cannot be scored within the length; file and line are named.
    """
    tokenizer_digest = fingerprint({"tokenizer": tokenizer.to_str()})
    tasks: list[PreparedTask] = []
    not_run: dict[str, str] = {}
    failed: dict[str, str] = {}
    for task in suite.icl_tasks:
        try:
            file = read_task_file(task, home)
            built = {k: tuple(build_items(task, file, k, tokenizer, max_seq_len)) for k in task.num_fewshot}
        except (MissingInputError, DataError) as e:
            if not tolerant:
                raise
            problems = not_run if isinstance(e, MissingInputError) else failed
            problems.update({task_name(task.label, k): str(e) for k in task.num_fewshot})
            report(str(e))
            continue
        for k, items in built.items():
            identity: Tree = {
                "harness_version": HARNESS_VERSION,
                "tokenizer": tokenizer_digest,
                "task_file_sha256": file.sha256,
                "task": task.settings(),
                "num_fewshot": k,
                "max_seq_len": task.max_seq_len or max_seq_len,
            }
            tasks.append(PreparedTask(task, k, file, items, identity))
    return Prepared(tuple(tasks), not_run, failed)
