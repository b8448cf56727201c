"""From a task's JSONL file to token ids: rows are checked, then prompts are built exactly as llm-foundry 0.22 does.

Nothing here needs a model: every row of a suite is read, checked and tokenized before the first forward pass. The
prompt rules, their oddities included, are those of llm-foundry's `eval/datasets/in_context_learning_evaluation.py`.
"""

import hashlib
import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated

import fsspec
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError
from tokenizers import Tokenizer

from openlm_pipeline.errors import ConfigError, DataError, MissingInputError
from openlm_pipeline.evaluation.suite import IclTask
from openlm_pipeline.layout import Home
from openlm_pipeline.lineage.fingerprint import fingerprint

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


_FIELDS: dict[str, type[_Fields]] = {
    "multiple_choice": _MultipleChoice,
    "schema": _Schema,
    "language_modeling": _LanguageModeling,
}


@dataclass(frozen=True)
class Row:
    """A row as contexts and continuations, one of which is a single text. Options are all pairs of the two."""

    line: int
    """Line of the file, from 1."""
    contexts: tuple[str, ...]
    continuations: tuple[str, ...]
    gold: int
    """Index of the right option; 0 where there is only one."""
    category: str | None
    item_hash: str
    """sha256 of the fields that the task uses, as they stand in the file."""

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


@dataclass(frozen=True)
class Request:
    """What the model is asked for: the log-probability of `continuation_ids` after `context_ids`; neither is empty."""

    context_ids: tuple[int, ...]
    continuation_ids: tuple[int, ...]


@dataclass(frozen=True)
class GenerationRequest:
    """What the model is asked to write: greedily, after `context_ids`."""

    context_ids: tuple[int, ...]
    max_new_tokens: int
    stop: tuple[str, ...]
    """The text ends before the first of these."""


@dataclass(frozen=True)
class Item:
    """One question: a request for each option, or a text to generate."""

    index: int
    """Position of the row in the file, from 0."""
    category: str | None
    gold: int
    requests: tuple[Request, ...]
    """One an option; empty in generation."""
    continuation_chars: tuple[int, ...]
    """Characters of each option's continuation as the row has it, without the space put before it."""
    item_hash: str
    prompt_hash: str
    """sha256 of the token ids of all requests."""
    generation: GenerationRequest | None = None
    answers: tuple[str, ...] = ()
    """What a generated text may start with to be right."""


def _where_to_get(task: IclTask, home: Home) -> str:
    if "://" not in task.dataset_uri and task.dataset_uri.startswith("raw/embedded/"):
        return f"It is made with the embedded corpus: `openlm demo` makes it below OPENLM_HOME, here {home.root}."
    return (
        "LLM Foundry's task files are in https://github.com/mosaicml/llm-foundry under scripts/eval/local_data. "
        f"A relative dataset_uri starts at OPENLM_HOME, here {home.root}."
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
    gold = 0
    if isinstance(fields, _MultipleChoice):
        contexts, continuations, gold = (strip(fields.query),), tuple(fields.choices), fields.gold
    elif isinstance(fields, _Schema):
        contexts, continuations, gold = tuple(fields.context_options), (strip(fields.continuation),), fields.gold
    else:
        assert isinstance(fields, _LanguageModeling)
        contexts, continuations = (strip(fields.context),), (strip(fields.continuation),)
    if gold >= max(len(contexts), len(continuations)):
        raise DataError(f"{where}: gold is {gold}, but there are {max(len(contexts), len(continuations))} options")
    if not all(text.strip() for text in continuations):
        raise DataError(f"{where}: a continuation is blank (task {task.label})")
    category = fields.category if task.has_categories else None
    return Row(line, contexts, continuations, gold, category, fingerprint(fields.model_dump(mode="json")))


def read_task_file(task: IclTask, home: Home) -> TaskFile:
    """Read and check every row of a task's file; blank lines are skipped.

    Raises:
        MissingInputError: there is no such file; the message says where it comes from.
        DataError: a malformed row (file and line are named), or no rows at all.
        ConfigError: the URL's protocol is unknown or its package is not installed.
    """
    path = home.resolve(task.dataset_uri)
    try:
        with fsspec.open(path, "rb") as f:
            data = f.read()
    except (FileNotFoundError, IsADirectoryError):
        raise MissingInputError(
            f"task {task.label} needs {path}, which does not exist. {_where_to_get(task, home)}"
        ) from None
    except (ValueError, ImportError) as e:
        raise ConfigError(f"task {task.label}: cannot open {path}: {e}") from e
    lines = enumerate(data.split(b"\n"), start=1)
    rows = tuple(_parse(task, path, number, line) for number, line in lines if line.strip())
    if not rows:
        raise DataError(f"{path} (task {task.label}) has no rows")
    return TaskFile(path, hashlib.sha256(data).hexdigest(), rows)


def fewshot_indices(num_rows: int, num_fewshot: int, index: int, rng: random.Random) -> list[int]:
    """Rows shown before row `index`, in LLM Foundry's order, which is that of a Python set.

    Draws from `rng` even when the draw is `index` itself, so that the rows of later questions depend on it.
    """
    chosen = set(rng.sample(range(num_rows), min(num_rows - 1, num_fewshot)))
    if index in chosen:
        chosen.remove(index)
        if len(chosen) < num_rows - 1:
            while (other := rng.choice(range(num_rows))) in chosen or other == index:
                pass
            chosen.add(other)
    return list(chosen)


def _question(task: IclTask, context: str, preceded: bool) -> str:
    """A question up to its answer. A schema's prelimiter comes before the example delimiter, as LLM Foundry has it."""
    delimiter = task.example_delimiter if preceded else ""
    if task.icl_task_type == "schema":
        return f"{task.question_prelimiter}{delimiter}{context}{task.continuation_delimiter}"
    return f"{delimiter}{task.question_prelimiter}{context}{task.continuation_delimiter}"


def _contexts(task: IclTask, row: Row, preceded: bool) -> tuple[str, ...]:
    """The texts between the preamble and the continuation.

    A schema's context has the delimiter only after a preamble, and only the delimiter is stripped, not the context.
    """
    if task.icl_task_type != "schema":
        return tuple(t.rstrip() if task.strip_dataset else t for t in (_question(task, row.contexts[0], preceded),))
    if not preceded:
        return tuple(f"{task.question_prelimiter}{context}" for context in row.contexts)
    delimiter = task.continuation_delimiter.rstrip() if task.strip_dataset else task.continuation_delimiter
    return tuple(f"{task.question_prelimiter}{task.example_delimiter}{c}{delimiter}" for c in row.contexts)


def _preamble(task: IclTask, rows: Sequence[Row], index: int, num_fewshot: int, rng: random.Random) -> str:
    text = task.prompt_string
    if num_fewshot:
        for i in fewshot_indices(len(rows), num_fewshot, index, rng):
            text += _question(task, rows[i].gold_context, preceded=bool(text)) + rows[i].gold_continuation
    return text


def plain_tokenizer(tokenizer: Tokenizer) -> Tokenizer:
    """The tokenizer without the truncation and padding that its file may carry; the one given is not changed."""
    if tokenizer.truncation is None and tokenizer.padding is None:
        return tokenizer
    copy = Tokenizer.from_str(tokenizer.to_str())
    copy.no_truncation()
    copy.no_padding()
    return copy


def _encode(tokenizer: Tokenizer, texts: Iterable[str]) -> dict[str, list[int]]:
    unique = list(dict.fromkeys(texts))
    return {t: e.ids for t, e in zip(unique, tokenizer.encode_batch(unique, add_special_tokens=False))}


def _encode_preamble(tokenizer: Tokenizer, text: str) -> list[int]:
    """With special tokens, so that a tokenizer's BOS starts the prompt; a closing special token is dropped."""
    encoding = tokenizer.encode(text, add_special_tokens=True)
    ids = encoding.ids
    return ids[:-1] if len(ids) > 1 and encoding.special_tokens_mask[-1] else ids


def build_items(
    task: IclTask, file: TaskFile, num_fewshot: int, tokenizer: Tokenizer, default_max_seq_len: int
) -> list[Item]:
    """The items of a task in file order.

    Preamble, context and continuation are tokenized apart; a context too long for `max_seq_len` with its continuation
    loses tokens on the left.

    Args:
        num_fewshot: solved rows before each question, drawn without replacement from the same file (or category).
        default_max_seq_len: longest sequence in tokens where the task does not say.

    Raises:
        DataError: a continuation leaves no token of context within the length, or a text has no tokens.
    """
    tokenizer = plain_tokenizer(tokenizer)
    max_seq_len = task.max_seq_len or default_max_seq_len
    # GPT-2 style BPE has a token " a", and continuations take a space; sentencepiece puts its own mark.
    space = " " if len(tokenizer.encode(" a", add_special_tokens=False).ids) == 1 else ""
    groups: dict[str | None, list[int]] = {}
    for i, row in enumerate(file.rows):
        groups.setdefault(row.category, []).append(i)

    prompts: dict[int, tuple[str, tuple[str, ...], tuple[str, ...]]] = {}
    for members in groups.values():
        rows = [file.rows[i] for i in members]
        rng = random.Random(task.fewshot_random_seed)
        for position, i in enumerate(members):
            preamble = _preamble(task, rows, position, num_fewshot, rng)
            continuations = tuple(t if t.startswith(" ") else space + t for t in file.rows[i].continuations)
            prompts[i] = preamble, _contexts(task, file.rows[i], preceded=bool(preamble)), continuations

    ids = _encode(tokenizer, (text for _, c, t in prompts.values() for text in (*c, *t)))
    preambles = {text: _encode_preamble(tokenizer, text) for text in {p for p, _, _ in prompts.values()}}

    def request(row: Row, context_ids: list[int], continuation_ids: list[int]) -> Request:
        room = max_seq_len - len(continuation_ids)
        if room < 1 or not context_ids or not continuation_ids:
            raise DataError(
                f"{file.path}, line {row.line} (task {task.label}): a context of {len(context_ids)} tokens and a "
                f"continuation of {len(continuation_ids)} cannot be scored within {max_seq_len} tokens; "
                "each needs at least one"
            )
        return Request(tuple(context_ids[-room:]), tuple(continuation_ids))

    items = []
    for i, row in enumerate(file.rows):
        preamble, contexts, continuations = prompts[i]
        requests = tuple(request(row, preambles[preamble] + ids[c], ids[t]) for c in contexts for t in continuations)
        lengths = tuple(len(t) for _ in contexts for t in row.continuations)
        prompt = json.dumps([[r.context_ids, r.continuation_ids] for r in requests], separators=(",", ":"))
        prompt_hash = hashlib.sha256(prompt.encode()).hexdigest()
        items.append(Item(i, row.category, row.gold, requests, lengths, row.item_hash, prompt_hash))
    return items
