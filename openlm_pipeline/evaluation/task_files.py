"""Task files: every row of a JSONL file is read and checked before anything is scored; errors name file and line.

Field names are LLM Foundry's. Nothing here needs a tokenizer.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from openlm_pipeline.errors import DataError, MissingInputError
from openlm_pipeline.evaluation.suite import IclTask
from openlm_pipeline.fingerprint import fingerprint
from openlm_pipeline.storage.home import Home
from openlm_pipeline.storage.remote import is_remote, open_remote, public, storage_errors

Text = Annotated[str, StringConstraints(min_length=1)]


class _Fields(BaseModel):
    """Fields of a row that a task uses; others are let be."""

    model_config = ConfigDict(frozen=True, strict=True, extra="ignore")
    category: Text | None = None


class _MultipleChoice(_Fields):
    query: str
    choices: Annotated[list[Text], Field(min_length=2)]
    gold: Annotated[int, Field(ge=0)]


class _Schema(_Fields):
    context_options: Annotated[list[Text], Field(min_length=2)]
    continuation: Text
    gold: Annotated[int, Field(ge=0)]


class _LanguageModeling(_Fields):
    context: str
    continuation: Text


class _Generation(_Fields):
    context: str
    answer: Text
    aliases: list[Text] = []
    chain_of_thought: str = ""


_FIELDS: dict[str, type[_Fields]] = {
    "multiple_choice": _MultipleChoice,
    "schema": _Schema,
    "language_modeling": _LanguageModeling,
    "generation_task_with_answers": _Generation,
}


@dataclass(frozen=True)
class Row:
    """A row as contexts and continuations, one of which is a single text. Options are all pairs of the two."""

    line: int
    """Line of the file, from 1."""
    contexts: tuple[str, ...]
    continuations: tuple[str, ...]
    """In generation the one text that answers the question in few-shot prompts, its chain of thought included."""
    gold: int
    """Index of the right option; 0 where there is only one."""
    category: str | None
    item_hash: str
    """sha256 of the fields that the task uses, as they stand in the file."""
    answers: tuple[str, ...] = ()
    """Answer and aliases as they stand in the file; in generation only."""
    responses: tuple[str, ...] = ()
    """Each of the answers after the chain of thought, as it stands in the file."""
    has_chain_of_thought: bool = False

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
    rows: tuple[Row, ...]


def _where_to_get(task: IclTask, home: Home) -> str:
    if "://" not in task.dataset_uri and task.dataset_uri.startswith("raw/embedded/"):
        return f"It is made with the embedded corpus: `openlm demo` makes it below OPENLM_HOME, here {home.root}."
    return (
        "LLM Foundry's task files are in https://github.com/mosaicml/llm-foundry under scripts/eval/local_data. "
        f"A relative dataset_uri starts at OPENLM_HOME, here {home.root}, or at the working folder; "
        "OPENLM_EVAL_DATA names another folder for the shipped suites."
    )


def _parse(task: IclTask, path: str, line: int, data: bytes) -> Row:
    where = f"{path}, line {line}"
    try:
        fields = _FIELDS[task.icl_task_type].model_validate_json(data)
    except ValidationError as e:
        wrong = "; ".join(f"{'.'.join(map(str, i['loc']))}: {i['msg']}".removeprefix(": ") for i in e.errors())
        raise DataError(f"{where} is not a row of {task.icl_task_type} (task {task.label}): {wrong}") from e
    if task.has_categories and fields.category is None:
        raise DataError(f"{where} has no category, which task {task.label} needs (has_categories)")

    def strip(text: str) -> str:
        return text.strip() if task.strip_dataset else text

    # LLM Foundry strips the string fields of a row; texts inside lists stay as they are.
    gold, answers, responses, has_thought = 0, (), (), False
    if isinstance(fields, _MultipleChoice):
        contexts, continuations, gold = (strip(fields.query),), tuple(fields.choices), fields.gold
    elif isinstance(fields, _Schema):
        contexts, continuations, gold = tuple(fields.context_options), (strip(fields.continuation),), fields.gold
    elif isinstance(fields, _LanguageModeling):
        contexts, continuations = (strip(fields.context),), (strip(fields.continuation),)
    else:
        assert isinstance(fields, _Generation)
        has_thought = "chain_of_thought" in fields.model_fields_set
        thought = fields.chain_of_thought + task.cot_delimiter if has_thought else ""
        shown = strip(fields.chain_of_thought) + task.cot_delimiter if has_thought else ""
        contexts, continuations = (strip(fields.context),), (shown + strip(fields.answer),)
        answers = tuple(dict.fromkeys((fields.answer, *fields.aliases)))
        responses = tuple(thought + answer for answer in answers)
        if not all(answer.strip() for answer in answers):
            raise DataError(f"{where}: an answer is blank (task {task.label})")
    if gold >= max(len(contexts), len(continuations)):
        raise DataError(f"{where}: gold is {gold}, but there are {max(len(contexts), len(continuations))} options")
    if not all(text.strip() for text in continuations):
        raise DataError(f"{where}: a continuation is blank (task {task.label})")
    category = fields.category if task.has_categories else None
    item_hash = fingerprint(fields.model_dump(mode="json"))
    return Row(line, contexts, continuations, gold, category, item_hash, answers, responses, has_thought)


def located(task: IclTask, home: Home) -> str:
    """A relative path starts at `OPENLM_HOME`, or where nothing is there at the working folder, as in LLM Foundry."""
    path = home.resolve(task.dataset_uri)
    here = Path(task.dataset_uri)
    if not is_remote(path) and not Path(path).exists() and here.is_file():
        return str(here.absolute())
    return path


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
            data = f.read()
    except MissingInputError:
        raise MissingInputError(
            f"task {task.label} needs {shown}, which does not exist. {_where_to_get(task, home)}"
        ) from None
    sha256 = hashlib.sha256(data).hexdigest()
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
