"""Task files: every row of a JSONL file is read and checked before anything is scored; errors name file and line.

Field names are LLM Foundry's. Nothing here needs a tokenizer.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import orjson
from pydantic import ValidationError

from openlm_pipeline.corpus.blocks import actual_compression, decompressed_blocks
from openlm_pipeline.errors import DataError, MissingInputError
from openlm_pipeline.evaluation.clusters import clusters
from openlm_pipeline.evaluation.suite import IclTask
from openlm_pipeline.evaluation.task_types import Options
from openlm_pipeline.fingerprint import fingerprint, settings_tree
from openlm_pipeline.storage.home import Home
from openlm_pipeline.storage.remote import is_remote, open_remote, public, storage_errors
from openlm_pipeline.units import format_bytes

_LARGEST = 4 << 30


@dataclass(frozen=True)
class TaskItem(Options):
    """A checked row of a file."""

    line: int = field(kw_only=True)
    """Line of the file, from 1."""
    category: str | None = field(kw_only=True)
    item_hash: str = field(kw_only=True)
    """sha256 of the fields that the task uses, as they stand in the file."""
    cluster: str | None = field(kw_only=True, default=None)
    """What the row says of which it goes with."""

    @property
    def question(self) -> str:
        """What is asked: the context; of a schema, and where there is none, with what it is to go on with."""
        is_whole = len(self.contexts) == 1 and bool(self.contexts[0].strip())
        return "\n".join(self.contexts if is_whole else (*self.contexts, *self.continuations))

    @property
    def gold_context(self) -> str:
        return self.contexts[self.gold] if len(self.contexts) > 1 else self.contexts[0]

    @property
    def gold_continuation(self) -> str:
        return self.continuations[self.gold] if len(self.continuations) > 1 else self.continuations[0]


@dataclass(frozen=True)
class TaskFile:
    """The checked rows of a task's file."""

    path: str
    sha256: str
    rows: tuple[TaskItem, ...]

    @cached_property
    def clusters(self) -> list[str | None]:
        """Of each row: the same for those that go together; None where it is alone."""
        found = clusters([row.question for row in self.rows])
        return [cluster if row.cluster is None else row.cluster for row, cluster in zip(self.rows, found)]


def _where_to_get(task: IclTask, home: Home) -> str:
    if "://" not in task.dataset_uri and task.dataset_uri.startswith("raw/embedded/"):
        return f"It is made with the embedded corpus: `openlm demo` makes it below OPENLM_HOME, here {home.root}."
    return (
        "LLM Foundry's task files are in https://github.com/mosaicml/llm-foundry under scripts/eval/local_data. "
        f"A relative dataset_uri starts at OPENLM_HOME, here {home.root}, or at the working folder; "
        "OPENLM_EVAL_DATA names another folder for the shipped suites."
    )


def _parse(task: IclTask, path: str, line: int, data: bytes) -> TaskItem:
    where = f"{path}, line {line}"
    try:
        fields = task.type.Fields.model_validate_json(data)
    except ValidationError as e:
        wrong = "; ".join(f"{'.'.join(map(str, i['loc']))}: {i['msg']}".removeprefix(": ") for i in e.errors())
        raise DataError(f"{where} is not a row of {task.icl_task_type} (task {task.label}): {wrong}") from e
    if task.has_categories and fields.category is None:
        raise DataError(f"{where} has no category, which task {task.label} needs (has_categories)")

    try:
        found = task.type.options(fields, task)
    except ValueError as e:
        raise DataError(f"{where}: {e} (task {task.label})") from e
    contexts, continuations, gold = found.contexts, found.continuations, found.gold
    if gold >= max(len(contexts), len(continuations)):
        raise DataError(f"{where}: gold is {gold}, but there are {max(len(contexts), len(continuations))} options")
    if not all(text.strip() for text in continuations):
        raise DataError(f"{where}: a continuation is blank (task {task.label})")
    category = fields.category if task.has_categories else None
    item_hash = fingerprint(settings_tree(fields))
    cluster = orjson.loads(data).get(task.cluster) if task.cluster.encode() in data else None
    return TaskItem(
        **vars(found),
        line=line,
        category=category,
        item_hash=item_hash,
        cluster=None if cluster is None else f"{task.label} {cluster}",
    )


def located(task: IclTask, home: Home) -> str:
    """A relative path starts at `OPENLM_HOME`, or where nothing is there at the working folder, as in LLM Foundry."""
    path = home.resolve(task.dataset_uri)
    here = Path(task.dataset_uri)
    if not is_remote(path) and not Path(path).exists() and here.is_file():
        return str(here.absolute())
    return path


def _whole(blocks: Iterable[tuple[int, bytes]], path: str) -> bytes:
    """
    Raises:
        DataError: more than any task file has.
    """
    data = bytearray()
    for _, block in blocks:
        data += block
        if len(data) > _LARGEST:
            raise DataError(f"{path} has more than {format_bytes(_LARGEST)}: it is no task file")
    return bytes(data)


def read_task_file(task: IclTask, home: Home) -> TaskFile:
    """Read and check every row of a task's file; blank lines are skipped.

    Raises:
        MissingInputError: there is no such file; the message says where it comes from.
        DataError: a malformed row (file and line are named), no rows at all, another file than the one that the suite
            pins, or categories that it names and the file lacks.
        ConfigError: the URL's protocol is unknown, its package is not installed, or access is denied.
    """
    path = located(task, home)
    shown = public(path)
    if not is_remote(path) and Path(path).is_dir():
        raise MissingInputError(f"task {task.label} needs {shown}, which is a folder. {_where_to_get(task, home)}")
    try:
        with open_remote(path, "task file") as f, storage_errors(f"task file {shown}", "can't be read"):
            hashed = hashlib.sha256()
            compression = actual_compression(f, path)
            data = _whole(decompressed_blocks(f, path, compression, on_raw=hashed.update), shown)
    except MissingInputError:
        raise MissingInputError(
            f"task {task.label} needs {shown}, which does not exist. {_where_to_get(task, home)}"
        ) from None
    sha256 = hashed.hexdigest()
    if task.sha256 not in (None, sha256):
        raise DataError(f"{shown} has sha256 {sha256}, and the suite pins {task.sha256} for task {task.label}")
    lines = enumerate(data.split(b"\n"), start=1)
    rows = tuple(_parse(task, shown, number, line) for number, line in lines if line.strip())
    if not rows:
        raise DataError(f"{shown} (task {task.label}) has no rows")
    if odd := [row for row in rows if row.has_chain_of_thought != rows[0].has_chain_of_thought]:
        raise DataError(
            f"{shown}, line {odd[0].line} (task {task.label}): all rows must have a chain_of_thought, or none of them"
        )
    if task.category_names:
        found, named = {row.category for row in rows}, set(task.category_names)
        if found != named:
            lacks, more = sorted(named - found), sorted(str(c) for c in found - named)
            raise DataError(
                f"{shown} does not have the categories of task {task.label}: "
                + "; ".join(
                    f"{what} {', '.join(names)}" for what, names in (("lacks", lacks), ("also has", more)) if names
                )
            )
    return TaskFile(shown, sha256, rows)
