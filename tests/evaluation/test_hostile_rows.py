"""Rows that mislead a score: answers among the shots, texts that say nothing, contexts cut; each is mended or said."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, processors

from openlm_pipeline.errors import DataError
from openlm_pipeline.evaluation.clusters import clusters
from openlm_pipeline.evaluation.prepare import prepare_suite
from openlm_pipeline.evaluation.results import Generated, generation_row
from openlm_pipeline.evaluation.suite import IclTask, Suite
from openlm_pipeline.evaluation.task_files import read_task_file
from openlm_pipeline.evaluation.tasks import Item, build_items
from openlm_pipeline.models.transformer import Transformer
from openlm_pipeline.storage.home import Home

CHOICES = {"choices": ["yes", "no"], "gold": 0}


def task(kind: str = "multiple_choice", shots: int = 0, **settings) -> IclTask:
    return IclTask(label="t", dataset_uri="task.jsonl", num_fewshot=(shots,), icl_task_type=kind, **settings)


@pytest.fixture
def items(home: Home, write_rows, tokenizer: Tokenizer) -> Callable[..., list[Item]]:
    def build(written: list[dict[str, Any]], spec: IclTask, length: int = 512, **settings) -> list[Item]:
        write_rows("task.jsonl", written)
        marked = settings.pop("tokenizer", tokenizer)
        return build_items(spec, read_task_file(spec, home), spec.num_fewshot[0], marked, length, **settings)

    return build


def test_a_row_of_the_same_question_is_no_solved_row(items, tokenizer: Tokenizer):
    """Other rows take its place; where there are none, one is missing."""
    rows = [{"query": f"Unique question {i}", **CHOICES} for i in range(6)] + [{"query": "SAME one", **CHOICES}] * 2
    built = items(rows, task(shots=5))
    for item in built[6:]:
        text = tokenizer.decode(item.requests[0].context_ids)
        assert text.count("SAME one") == 1 and item.shots == 5
    plain = items(rows, task(shots=5), as_foundry=True)
    assert any(tokenizer.decode(i.requests[0].context_ids).count("SAME one") == 2 for i in plain[6:])
    for mine, theirs in zip(built[:6], plain):  # where nothing repeats, prompts are LLM Foundry's
        assert mine.requests == theirs.requests
    few = items([*rows[:2], *rows[6:]], task(shots=3))
    assert [i.shots for i in few] == [3, 3, 2, 2]


def test_the_twin_of_a_schema_with_another_ending_is_another_question(items):
    options = {"context_options": ["the cat ran as the cat", "the cat ran as the dog"], "gold": 0}
    rows = [{**options, "continuation": ending} for ending in ("was big", "was old")]
    assert items(rows, task("schema", shots=1))[0].shots == 1


def test_fewer_rows_than_shots_and_cut_contexts_are_said(home: Home, items, tokenizer: Tokenizer):
    rows = [{"query": "what did the dog see " * n, **CHOICES} for n in (1, 2, 9)]
    built = items(rows, task(shots=10), length=60)
    assert [i.shots for i in built] == [2, 2, 2]
    assert all(i.cut_tokens == len(tokenizer.encode("").ids) or i.cut_tokens > 0 for i in built)
    said: list[str] = []
    suite = Suite(name="s", icl_tasks=(task(shots=10),))
    prepared = prepare_suite(suite, home, tokenizer, 60, said.append)
    assert said == [f"t/10-shot: {w}" for w in prepared[0].warnings]
    assert any("contexts are too long for the model and lose up to" in line for line in said)
    assert "t/10-shot: 3 of 3 items have 2 solved rows before them, not 10" in said


def test_what_is_said_stands_in_table_and_scorecard(items, scored, model: Transformer):
    items([{"query": "what did the dog see", **CHOICES}] + [{"query": "the cat", **CHOICES}] * 2, task())
    card, result = scored(Suite(name="s", icl_tasks=(task(shots=10),)), model, 20)
    (score,) = card.tasks
    assert score.fewer_shots == 3 and score.num_clusters == 2
    assert score.cut_items == sum(n > 0 for n in result.items["cut_tokens"].to_pylist())
    assert card.warnings == result.warnings and "solved rows before them" in " ".join(card.warnings)
    assert score.majority == 1.0 and score.chance == 0.5
    assert score.bits_per_byte > 0 and score.bits_low < score.bits_per_byte < score.bits_high


def test_an_alias_of_which_nothing_is_left_is_named_and_never_exact(home: Home, items, tokenizer: Tokenizer):
    spec = task("generation_task_with_answers")
    (item,) = items([{"context": "which letter", "answer": "(a", "aliases": ["b"]}], spec)
    rows = [generation_row(spec, 0, item, Generated(text, 2)) for text in ("anything", "b", "bc", "")]
    assert [r["correct"] for r in rows] == [True] * 4  # LLM Foundry's rule
    assert [r["exact"] for r in rows] == [False, True, False, False]
    said: list[str] = []
    prepare_suite(Suite(name="s", icl_tasks=(spec,)), home, tokenizer, 128, said.append)
    assert len(said) == 1 and "line 1 of" in said[0] and "'(a'" in said[0] and "any text as right" in said[0]


def test_a_text_without_a_context_is_scored_after_the_end_of_a_document(items, tokenizer: Tokenizer):
    rows = [{"query": "", "choices": ["the cats sat", "the cats sits"], "gold": 0}]
    with_end = Tokenizer.from_str(tokenizer.to_str())
    with_end.add_special_tokens(["<|endoftext|>"])
    (item,) = items(rows, task(), tokenizer=with_end)
    assert {r.context_ids for r in item.requests} == {(with_end.token_to_id("<|endoftext|>"),)}
    assert with_end.decode(item.requests[0].continuation_ids) == " the cats sat"
    with pytest.raises(DataError, match="a context of 0 tokens"):
        items(rows, task())  # this tokenizer has no such token


def test_pairs_without_a_context_are_questions_of_their_own(items, tokenizer: Tokenizer):
    rows = [{"query": "", "choices": [f"the {w} sat", f"the {w} sits"], "gold": 0} for w in ("cat", "dog", "ball")]
    with_end = Tokenizer.from_str(tokenizer.to_str())
    with_end.add_special_tokens(["<|endoftext|>"])
    built = items(rows, task(shots=2), tokenizer=with_end)
    assert [(i.cluster, i.shots) for i in built] == [(None, 2)] * 3


def test_a_prompt_that_begins_with_bos_itself_has_one(items, tokenizer: Tokenizer):
    marked = Tokenizer.from_str(tokenizer.to_str())
    marked.add_special_tokens(["<s>"])
    bos = marked.token_to_id("<s>")
    marked.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", bos)])
    rows = [{"query": "what did it see", **CHOICES}, {"query": "the cat", **CHOICES}]
    for shots in (0, 1):
        for start in ("", "<s>"):
            (item, _) = items(rows, task(shots=shots, prompt_string=start), tokenizer=marked)
            assert item.requests[0].context_ids.count(bos) == 1 and item.requests[0].context_ids[0] == bos


@pytest.mark.parametrize("name", ["task.jsonl.gz", "task.jsonl"])
def test_a_compressed_file_is_read_whatever_its_name(home: Home, name: str):
    rows = [{"query": f"q {i}", **CHOICES} for i in range(3)]
    path = home.root / name
    path.parent.mkdir(parents=True)
    path.write_bytes(gzip.compress("".join(json.dumps(r) + "\n" for r in rows).encode()))
    spec = task().model_copy(update={"dataset_uri": name})
    assert len(read_task_file(spec, home).rows) == 3
    path.write_bytes(path.read_bytes()[:-12])
    with pytest.raises(DataError, match="truncated|ends"):
        read_task_file(spec, home)


PASSAGE = " ".join(f"word{i}" for i in range(60))


def test_rows_of_one_passage_or_question_go_together():
    asked = [f"{PASSAGE} Question: {w}?" for w in ("why", "who", "when")]
    lone = ["a question of its own", "b another one", "a question of its own"]
    named = clusters([*asked, *lone])
    assert named[0] == named[1] == named[2] != named[3] == named[5] is not None and named[4] is None


def test_a_template_is_no_passage():
    instructions = (
        "Complete the rest of the sequence, making sure that all of it is right in each and every place. " * 4
    )
    rows = [f"{instructions}{'AB'[i % 2] * 240} number {i}" for i in range(120)]
    assert set(clusters(rows)) == {None}
    assert set(clusters([f"{instructions} number {i}" for i in range(9)])) == {None}


def test_a_row_says_itself_what_it_goes_with(items, home: Home):
    rows = [{"query": f"q {i}", **CHOICES, "cluster": i // 2, "passage": "p"} for i in range(4)]
    assert [i.cluster for i in items(rows, task())] == ["t 0", "t 0", "t 1", "t 1"]
    assert len({i.cluster for i in items(rows, task(cluster="passage"))}) == 1


def test_some_rows_have_the_prompts_that_they_have_among_all(items):
    rows = [{"query": f"q {i}", **CHOICES} for i in range(8)]
    every, some = items(rows, task(shots=2)), items(rows, task(shots=2), rows={2, 5})
    assert some == [every[2], every[5]]


def test_the_path_of_a_home_is_in_no_cluster(items, tmp_path: Path):
    assert str(tmp_path) not in str(items([{"query": "q", **CHOICES, "cluster": "p"}] * 2, task())[0])
