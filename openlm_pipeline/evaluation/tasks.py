"""From checked rows to token ids: prompts are built exactly as llm-foundry 0.22 does.

Nothing here needs a model: all prompts of a suite are built before the first forward pass. The prompt rules, their
oddities included, are those of llm-foundry's `eval/datasets/in_context_learning_evaluation.py`.
"""

import hashlib
import json
import random
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass

from tokenizers import Encoding, Tokenizer

from openlm_pipeline.errors import DataError
from openlm_pipeline.evaluation.suite import IclTask
from openlm_pipeline.evaluation.task_files import TaskFile, TaskItem
from openlm_pipeline.registry import RULES

_COT_EXTRA_TOKENS = 10
"""Added by LLM Foundry to the length of the longest answer where a task has a `cot_delimiter`."""
_TEXTS_AT_ONCE = 1024
_DOCUMENT_ENDS = ("<|endoftext|>", "<s>", "<|begin_of_text|>", "<bos>", "</s>", "<|im_end|>", "<|end_of_text|>")


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
    continuation_bytes: tuple[int, ...] = ()
    """UTF-8 bytes of each option's continuation as the row has it."""
    cluster: str | None = None
    """The same for items that go together; None where it is alone."""
    shots: int = 0
    """Solved rows before the question: fewer than asked for where the file has no more."""
    cut_tokens: int = 0
    """Of its longest context, that the model's length left no room for."""


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


def _without_answer(shots: list[int], rows: Sequence[TaskItem], index: int, seed: int) -> list[int]:
    """Other rows, drawn apart, in place of those that have the question of row `index` too, as long as there are any.

    LLM Foundry has no such rule; where no row repeats a question the prompts are its own.
    """
    same = {i for i in shots if rows[i].question == rows[index].question}
    if not same:
        return shots
    rng = random.Random(f"{seed} {index}")
    left = [i for i in range(len(rows)) if i not in shots and rows[i].question != rows[index].question]
    others = iter(rng.sample(left, min(len(left), len(same))))
    return [i for i in ((next(others, None) if i in same else i) for i in shots) if i is not None]


def _preamble(task: IclTask, rows: Sequence[TaskItem], shots: Sequence[int]) -> str:
    text = task.prompt_string
    for i in shots:
        text += task.type.question(task, rows[i].gold_context, preceded=bool(text)) + rows[i].gold_continuation
    return text


def plain_tokenizer(tokenizer: Tokenizer) -> Tokenizer:
    """The tokenizer without the truncation and padding that its file may carry; the one given is not changed."""
    if tokenizer.truncation is None and tokenizer.padding is None:
        return tokenizer
    copy = Tokenizer.from_str(tokenizer.to_str())
    copy.no_truncation()
    copy.no_padding()
    return copy


def _encodings(tokenizer: Tokenizer, texts: Iterable[str], special: bool) -> Iterator[tuple[str, Encoding]]:
    """Each different text with its encoding, a few at a time: encodings take many times the memory of their ids."""
    unique = list(dict.fromkeys(texts))
    for start in range(0, len(unique), _TEXTS_AT_ONCE):
        some = unique[start : start + _TEXTS_AT_ONCE]
        yield from zip(some, tokenizer.encode_batch(some, add_special_tokens=special))


def _encode(tokenizer: Tokenizer, texts: Iterable[str]) -> dict[str, tuple[int, ...]]:
    return {text: tuple(e.ids) for text, e in _encodings(tokenizer, texts, special=False)}


def _encode_preambles(tokenizer: Tokenizer, texts: Iterable[str], as_foundry: bool) -> dict[str, tuple[int, ...]]:
    """With special tokens, so that a tokenizer's BOS starts the prompt; a closing special token is dropped, and a
    second BOS, where the text begins with one itself."""
    found = {}
    for text, encoding in _encodings(tokenizer, texts, special=True):
        ids = tuple(encoding.ids)
        if not as_foundry and len(ids) > 1 and ids[0] == ids[1] and encoding.special_tokens_mask[0]:
            ids = ids[1:]
        found[text] = ids[:-1] if len(ids) > 1 and encoding.special_tokens_mask[-1] else ids
    return found


def prefix_ids(tokenizer: Tokenizer) -> tuple[int, ...]:
    """What a text is scored after that nothing precedes: the token that ends a document, or begins one."""
    return next(((i,) for token in _DOCUMENT_ENDS if (i := tokenizer.token_to_id(token)) is not None), ())


def _longest_answer(tokenizer: Tokenizer, task: IclTask, rows: Sequence[TaskItem]) -> int:
    """Tokens that a generation may take: those of the longest answer of the file, special tokens included."""
    texts = (text for row in rows for text in row.responses)
    longest = max(len(encoding.ids) for _, encoding in _encodings(tokenizer, texts, special=True))
    return longest + (_COT_EXTRA_TOKENS if task.cot_delimiter else 0)


def build_items(
    task: IclTask,
    file: TaskFile,
    num_fewshot: int,
    tokenizer: Tokenizer,
    default_max_seq_len: int,
    *,
    as_foundry: bool = False,
    rows: Collection[int] | None = None,
) -> list[Item]:
    """The items of a task in file order.

    Preamble, context and continuation are tokenized apart; a context too long for `max_seq_len` with its continuation
    loses tokens on the left; an empty one is the tokenizer's `prefix_ids`.

    Args:
        num_fewshot: solved rows before each question, drawn without replacement from the same file (or category).
        default_max_seq_len: longest sequence in tokens where the task does not say.
        as_foundry: leave what is LLM Foundry's: solved rows that have the row's own question, a second BOS, no empty
            contexts.
        rows: numbers of those to ask, by default all; their prompts are the same either way.

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

    generates = RULES[task.rule].generates
    prompts: dict[int, tuple[str, tuple[str, ...], tuple[str, ...]]] = {}
    num_shots: dict[int, int] = {}
    longest: dict[str | None, int] = {}
    for category, members in groups.items():
        of_category = [file.rows[i] for i in members]
        rng = random.Random(task.fewshot_random_seed)
        if generates:
            longest[category] = _longest_answer(tokenizer, task, of_category)
        for position, i in enumerate(members):
            shots = fewshot_indices(len(members), num_fewshot, position, rng) if num_fewshot else []
            if not as_foundry:
                shots = _without_answer(shots, of_category, position, task.fewshot_random_seed)
            if rows is not None and i not in rows:
                continue
            num_shots[i] = len(shots)
            preamble = _preamble(task, of_category, shots)
            texts = () if generates else file.rows[i].continuations
            alone = task.type.whole_texts
            continuations = tuple(t if alone or t.startswith(" ") else space + t for t in texts)
            contexts = ("",) if alone else task.type.contexts(task, file.rows[i].contexts, preceded=bool(preamble))
            prompts[i] = preamble, contexts, continuations

    ids = _encode(tokenizer, (text for _, c, t in prompts.values() for text in (*c, *t)))
    preambles = _encode_preambles(tokenizer, (preamble for preamble, _, _ in prompts.values()), as_foundry)
    prefix = () if as_foundry else prefix_ids(tokenizer)

    def windows(row: TaskItem, context_ids: tuple[int, ...], text_ids: tuple[int, ...]) -> tuple[Request, ...]:
        parts = [text_ids[start : start + max_seq_len - 1] for start in range(0, len(text_ids), max_seq_len - 1)]
        before = [context_ids[-1:], *(part[-1:] for part in parts)]
        return tuple(request(row, context, part) for context, part in zip(before, parts)) or (request(row, (), ()),)

    def request(row: TaskItem, context_ids: tuple[int, ...], continuation_ids: tuple[int, ...]) -> Request:
        room = max_seq_len - len(continuation_ids)
        if room < 1 or not context_ids or not continuation_ids:
            raise DataError(
                f"{file.path}, line {row.line} (task {task.label}): a context of {len(context_ids)} tokens and a "
                f"continuation of {len(continuation_ids)} cannot be scored within {max_seq_len} tokens; "
                "each needs at least one"
            )
        return Request(context_ids[-room:], continuation_ids)

    def generation(row: TaskItem, context_ids: tuple[int, ...]) -> GenerationRequest:
        room = max_seq_len - longest[row.category]
        if room < 1 or not context_ids:
            raise DataError(
                f"{file.path}, line {row.line} (task {task.label}): a context of {len(context_ids)} tokens and an "
                f"answer of up to {longest[row.category]} do not fit into {max_seq_len} tokens; each needs at least one"
            )
        new = task.generation_kwargs.max_new_tokens or longest[row.category]
        return GenerationRequest(context_ids[-room:], new, task.early_stopping_criteria)

    items = []
    for i, (preamble, contexts, continuations) in sorted(prompts.items()):
        row = file.rows[i]
        # One object for all options of a question.
        whole = [preambles[preamble] + ids[c] or prefix for c in contexts]
        asked, requests = None, ()
        if generates:
            asked = generation(row, whole[0])
            prompt = json.dumps([asked.context_ids, asked.max_new_tokens, asked.stop], separators=(",", ":"))
        else:
            if task.type.whole_texts:
                requests = windows(row, whole[0], ids[continuations[0]])
            else:
                requests = tuple(request(row, context, ids[t]) for context in whole for t in continuations)
            prompt = json.dumps([[r.context_ids, r.continuation_ids] for r in requests], separators=(",", ":"))
        texts = [t for _ in contexts for t in row.continuations] if requests else []
        used = max(len(r.context_ids) for r in requests or [asked])
        items.append(
            Item(
                i,
                row.category,
                row.gold,
                requests,
                tuple(map(len, texts)),
                row.item_hash,
                hashlib.sha256(prompt.encode()).hexdigest(),
                asked,
                row.answers,
                continuation_bytes=tuple(len(t.encode()) for t in texts),
                cluster=file.clusters[i],
                shots=num_shots[i],
                cut_tokens=max(map(len, whole)) - used,
            )
        )
    return items
