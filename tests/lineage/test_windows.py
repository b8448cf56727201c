"""Windows of texts are found in token streams whatever the tokens are cut into, and nothing else is."""

import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openlm_pipeline.evaluation.suite import Suite
from openlm_pipeline.lineage import windows as w
from openlm_pipeline.lineage.suite_windows import suite_windows
from openlm_pipeline.lineage.windows import RULES, TokenCharacters, normalised
from openlm_pipeline.storage.home import Home

CHARACTERS, WORDS = RULES["50"], RULES["13w"]
BYTES = [bytes([b]) for b in range(256)]
"""A tokenizer of single bytes, with which every character that is not ASCII is cut into several tokens."""
TEXT = (
    "Größe, façade, naïve: letters beyond ASCII are letters too. Сколько лет, сколько зим, и всё одно и то же. "
    "数据从原始文本到分数,每一步都可以重现,没有一个数字是凭空而来的,我们可以一步一步地检查它们,直到最后一个字节为止。"
    "और हर संख्या का स्रोत बताया जा सकता है, बिना किसी अपवाद के."
)


def suite_of(tmp_path: Path, rows: str, kind: str = "language_modeling") -> Suite:
    (tmp_path / "task.jsonl").write_text(rows, encoding="utf-8")
    task = {"label": "task", "dataset_uri": str(tmp_path / "task.jsonl"), "num_fewshot": [0], "icl_task_type": kind}
    return Suite(name="s", icl_tasks=[task])


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ("It's NAÏVE", "it’s naïve"),
        ("cafe\u0301", "café"),
        ("ﬁnd ①", "FIND 1"),
        ("straße", "STRASSE"),
        ("a -- b\n\n  c", "a b c"),
        ("한국", "\u1112\u1161\u11ab\u1100\u116e\u11a8"),
    ],
)
def test_case_accents_and_punctuation_make_no_difference(text: str, same: str):
    for rule in RULES.values():
        assert normalised(text, rule) == normalised(same, rule)


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@settings(deadline=None, max_examples=60)
@given(st.data())
def test_tokens_stand_for_the_characters_of_their_text_however_it_is_cut(rule, data):
    alphabet = st.sampled_from("aB9 .\n-’éßд数\u0301🦊ü")
    pieces = data.draw(st.lists(st.text(alphabet, min_size=1, max_size=5), min_size=1, max_size=12))
    text = "".join(pieces).encode()
    cuts = sorted(data.draw(st.sets(st.integers(1, max(1, len(text) - 1)), max_size=12)))
    tokens = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)]) if a < b]
    table = TokenCharacters(tokens, rule)
    ids = table.joined(np.arange(len(tokens)))
    found = "".join(
        "".join(map(chr, table.characters[s : s + n])) for s, n in zip(table.starts[ids], table.lengths[ids])
    )
    if rule.words:  # two tokens may each have the space between them
        found = " ".join(found.split())
    assert found == normalised(text.decode(), rule).strip()


def test_a_document_is_found_through_chunks_and_characters_cut_by_tokens(tmp_path, monkeypatch):
    monkeypatch.setattr(w, "_CHUNK", 64)
    made = suite_windows(
        suite_of(tmp_path, f'{{"context": "{TEXT}", "continuation": "end"}}'), Home(tmp_path), CHARACTERS
    )
    table, rng = TokenCharacters([*BYTES, None], CHARACTERS), random.Random(0)
    others = "".join(rng.choice("abcdefg ,.") for _ in range(700))
    for before in (0, 1, 63, 64, 200):
        stream = [*others[:before].encode(), 256, *f"So: {TEXT.upper()} end.".encode(), 256, *others.encode()]
        numbers, begin, end = made.to_find().find(np.array(stream), table)
        assert len(set(numbers.tolist())) == len(numbers) == len(made.hashes)
        assert (
            (end > begin).all() and begin.min() >= before and end.max() <= before + 8 + len(TEXT.upper().encode()) + 4
        )
    halves = [*TEXT[:80].encode(), 256, *TEXT[80:110].encode()]
    numbers, _, _ = made.to_find().find(np.array(halves), table)
    assert 0 < len(numbers) < 20  # none over the end of a document


def test_an_item_below_the_window_is_found_whole_or_said_to_be_too_short(tmp_path):
    rows = [
        ("thirty letters are just enough x", "yes"),  # a question of 27, with its answer 30
        ("forty letters make a question that is whole", "no"),
        ("too short", "ever"),
        ("a question of fifty letters and more, which has windows of its own here", "short"),
    ]
    text = "\n".join(f'{{"context": "{c}", "continuation": "{a}"}}' for c, a in rows)
    made = suite_windows(suite_of(tmp_path, text), Home(tmp_path), CHARACTERS)
    lengths = [len(normalised(c, CHARACTERS)) for c, _ in rows]
    assert lengths[:3] == [27, 36, 8] and lengths[3] > 50
    counts = made.counts().tolist()
    assert counts == [[0, 1], [1, 1], [0, 0], [lengths[3] - 49, 5]]
    table = TokenCharacters([*BYTES, None], CHARACTERS)

    def found(written: str) -> set[tuple[int, bool]]:
        numbers, _, _ = made.to_find().find(np.frombuffer(written.encode(), np.uint8), table)
        hit = np.isin(made.hashes, made.distinct[0][numbers])
        return set(zip(made.item[hit].tolist(), made.answer[hit].tolist()))

    assert found("And thirty letters are just enough x. Yes! So it is.") == {(0, True)}
    assert found("thirty letters are just enough x; no") == set()
    assert found("That forty letters make a question that is whole, is known.") == {(1, False)}
    assert found("forty letters make a question that is") == set()
    assert found("too short, ever") == set()


def test_what_all_questions_of_a_task_have_is_no_part_of_them(tmp_path):
    rng = random.Random(1)
    rows = [
        f"Question: {' '.join(rng.choice(['red', 'blue', 'old', 'new', 'big']) for _ in range(30))}" for _ in range(12)
    ]
    text = "\n".join(f'{{"context": "{q}\\nAnswer:", "continuation": "{n}."}}' for n, q in enumerate(rows))
    for rule in RULES.values():
        made = suite_windows(suite_of(tmp_path, text), Home(tmp_path), rule)
        assert "question" not in (every := "".join(map(chr, made.text))) and "answer" not in every
        asked = normalised(rows[3].removeprefix("Question: "), rule).strip()
        assert asked[: rule.size] in every
