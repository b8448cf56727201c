"""Texts as they stand, in bits per byte: by torch alone, whatever their length, by domain, and with no accuracy."""

import math

import pytest
import torch
from tokenizers import Tokenizer

from openlm_pipeline.evaluation.scorecard import Scorecard
from openlm_pipeline.evaluation.suite import IclTask, Suite
from openlm_pipeline.models.transformer import Transformer

ROOM = 24
WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "then", "it", "ran", "to", "see", "what", "dog", "red", "ball"]


def sentence(i: int, length: int = 6) -> str:
    return " ".join(WORDS[(7 * i + 3 * j) % len(WORDS)] for j in range(length))


def task(label: str = "prose", **settings) -> IclTask:
    known = {"dataset_uri": f"{label}.jsonl", "num_fewshot": (0,), "icl_task_type": "held_out_text"}
    return IclTask(label=label, **{**known, **settings})


@pytest.fixture
def ending(tokenizer: Tokenizer) -> Tokenizer:
    """The tokenizer with a token for the end of a document."""
    made = Tokenizer.from_str(tokenizer.to_str())
    made.add_special_tokens(["<|endoftext|>"])
    return made


@pytest.fixture
def wide(model: Transformer) -> Transformer:
    from openlm_pipeline.models.config import ModelConfig

    wider = Transformer(ModelConfig(**{**model.config.model_dump(), "vocab_size": 330}))
    with torch.no_grad():
        for name, p in wider.named_parameters():
            p.normal_(std=0.2, generator=torch.Generator().manual_seed(len(name)))
    return wider.eval()


def bits(model: Transformer, tokenizer: Tokenizer, text: str, room: int) -> float:
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    before, nats = [tokenizer.token_to_id("<|endoftext|>")], 0.0
    for start in range(0, len(ids), room - 1):
        window = ids[start : start + room - 1]
        with torch.no_grad():
            logits = model(torch.tensor([before + window[:-1]]))[0]
        nats += torch.nn.functional.cross_entropy(logits, torch.tensor(window), reduction="sum").item()
        before = window[-1:]
    return nats / math.log(2) / len(text.encode())


def test_each_text_has_the_bits_of_its_windows(scored, write_rows, ending: Tokenizer, wide: Transformer):
    texts = [sentence(i, 3 + 9 * i) for i in range(8)] + [" spaces kept  \n", "naïve 日本"]
    write_rows("prose.jsonl", [{"text": t} for t in texts])
    card, result = scored(Suite(name="s", icl_tasks=(task(),)), wide, ROOM, ending)
    rows = result.items.to_pylist()
    expected = [bits(wide, ending, text, ROOM) for text in texts]
    assert [r["value"] for r in rows] == pytest.approx(expected, rel=1e-4)
    assert {r["value_kind"] for r in rows} == {"bits_per_byte"} and {r["correct"] for r in rows} == {None}
    assert [r["choice_bytes"] for r in rows] == [[len(t.encode())] for t in texts]
    (score,) = card.tasks
    weighted = sum(e * len(t.encode()) for e, t in zip(expected, texts)) / sum(len(t.encode()) for t in texts)
    assert score.bits_per_byte == pytest.approx(weighted, rel=1e-4)
    assert (score.accuracy, score.chance, score.status) == (None, None, "scored")
    assert [(a.name, a.kind) for a in card.averages] == [("held_out_text", "bits_per_byte")]
    assert card.average == score.bits_per_byte


def test_domains_stand_beside_accuracies(scored, write_rows, task_rows, ending: Tokenizer, wide: Transformer):
    write_rows("prose.jsonl", [{"text": sentence(i), "category": "ab"[i % 2]} for i in range(10)])
    write_rows("last.jsonl", task_rows["last_word"])
    lm = task("last", icl_task_type="language_modeling")
    suite = Suite(name="s", icl_tasks=(lm, task(has_categories=True)))
    card, _ = scored(suite, wide, ROOM, ending)
    assert card.headline.name == "all_tasks" and card.headline.tasks == ("last/0-shot",)
    parts = [c.bits_per_byte for c in card.categories]
    assert [c.category for c in card.categories] == ["a", "b"]
    by_name = {a.name: a for a in card.averages}
    assert by_name["held_out_text"].value == pytest.approx(sum(parts) / 2) == card.tasks[1].bits_per_byte
    assert Scorecard.from_json(card.model_dump_json()) == card


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"num_fewshot": (1,)}, "has num_fewshot"),
        ({"prompt_string": "x"}, "no prompt_string"),
        ({"scored_by": "mean"}, "does not judge"),
    ],
)
def test_what_a_text_has_not_is_refused(settings: dict, says: str):
    with pytest.raises(ValueError, match=says):
        task(**settings)
    with pytest.raises(ValueError, match="is of accuracies"):
        Suite(name="s", icl_tasks=(task(),), averages={"mine": ("prose/0-shot",)})
