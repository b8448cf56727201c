"""Scores are those of one plain forward pass a request, however they are batched; finished tasks are not redone."""

import copy
import json
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import score_saved
import torch
from score_saved import CONTEXT, save_job
from torch import nn

from openlm_pipeline.errors import DataError, MissingInputError
from openlm_pipeline.evaluation.items import read_items
from openlm_pipeline.evaluation.model import NativeModel, computing
from openlm_pipeline.evaluation.results import Generated, RequestScore, generation_row, item_row
from openlm_pipeline.evaluation.scorer import score_questions, score_suite
from openlm_pipeline.evaluation.suite import IclTask, load_suite
from openlm_pipeline.evaluation.task_files import read_task_file
from openlm_pipeline.evaluation.tasks import Item, Request, build_items


def plain(model, request: Request) -> tuple[float, bool]:
    """The definition: one request, no padding, all logits."""
    with torch.no_grad():
        ids = torch.tensor([request.context_ids + request.continuation_ids])
        logprobs = model(ids)[0].double().log_softmax(-1)
    first = len(request.context_ids)
    picked = [(logprobs[first + j - 1], t) for j, t in enumerate(request.continuation_ids)]
    return sum(float(lp[t]) for lp, t in picked), all(int(lp.argmax()) == t for lp, t in picked)


class Recording:
    """A scoring model that passes everything on and remembers what shapes went through."""

    def __init__(self, model, scale: float = 1.0):
        self.inner, self.scale, self.batches, self.positions = NativeModel(lambda: model), scale, [], 0

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def logits(self, ids_BS, rows_P, columns_P, **branches):
        self.batches.append(tuple(ids_BS.shape))
        self.positions += len(rows_P)
        return self.inner.logits(ids_BS, rows_P, columns_P, **branches) * self.scale


@pytest.fixture
def scoring_model(model):
    return NativeModel(lambda: model)


@pytest.fixture(scope="module")
def questions() -> list[list[Request]]:
    """Options after one context; a continuation after several; and texts that share all, or nothing."""
    g = torch.Generator().manual_seed(1)

    def ids(n):
        return tuple(torch.randint(0, 320, (n,), generator=g).tolist())

    lengths = torch.randint(1, 30, (40, 3), generator=g).tolist()
    choices = [[Request(context, ids(n)) for n in (a, b, 1)] for a, b, c in lengths for context in [ids(c)]]
    schemas = [
        [Request(same + ids(n), end) for n in (a, b)]
        for a, b, c in lengths[:15]
        for same, end in [(ids(c), ids(a % 4 + 1))]
    ]
    alone = [[Request(ids(a), ids(b))] for a, b, _ in lengths[:10]]
    shared = ids(20)
    letters = [[Request(shared, (token,)) for token in (5, 9, 5, 300)]]  # options of one token share their whole input
    inside = [[Request(shared, (7, 8)), Request(shared[:-1], (shared[-1], 7))]]
    apart = [[Request((1, 2), (3, 4)), Request((2, 2), (3, 4))]]
    return choices + schemas + alone + letters + inside + apart


def flat(nested):
    return [x for group in nested for x in group]


def greedy(model, context: tuple[int, ...], n: int) -> Request:
    out = list(context)
    with torch.no_grad():
        for _ in range(n):
            out.append(int(model(torch.tensor([out]))[0, -1].argmax()))
    return Request(context, tuple(out[len(context) :]))


def test_scores_are_those_of_single_forward_passes(model, scoring_model, questions):
    questions = [*questions, [greedy(model, (1, 2, 3), 4)]]
    scores = score_questions(scoring_model, questions, batch_tokens=512)
    assert [len(s) for s in scores] == [len(q) for q in questions]
    for request, score in zip(flat(questions), flat(scores), strict=True):
        total, hit = plain(model, request)
        assert score.sum_logprob == pytest.approx(total, abs=1e-4, rel=1e-5)
        assert score.num_tokens == len(request.continuation_ids)
        assert score.all_argmax == hit
    assert scores[-1][0].all_argmax
    assert not all(s.all_argmax for s in flat(scores))


@pytest.mark.parametrize("batch_tokens", [1, 64, 333, 100_000])
def test_scores_do_not_depend_on_batching_or_order(scoring_model, questions, batch_tokens):
    reference = score_questions(scoring_model, questions, batch_tokens=512)
    batched = score_questions(scoring_model, questions[::-1], batch_tokens=batch_tokens)[::-1]
    for a, b in zip(flat(reference), flat(batched), strict=True):
        assert a.sum_logprob / a.num_tokens == pytest.approx(b.sum_logprob / b.num_tokens, abs=1e-5)
        assert a.all_argmax == b.all_argmax


def test_little_is_computed_in_vain(model, questions):
    recording, seen = Recording(model), []
    score_questions(recording, questions, batch_tokens=300, progress=lambda done, total: seen.append((done, total)))
    assert all(b * s <= 300 for b, s in recording.batches)
    assert recording.positions == sum(len(r.continuation_ids) for r in flat(questions))
    computed, whole = sum(b * s for b, s in recording.batches), 0
    needed = 0
    for question in questions:
        texts = [r.context_ids + r.continuation_ids[:-1] for r in question]
        whole += sum(map(len, texts))
        needed += len({text[: n + 1] for text in texts for n in range(len(text))})  # the nodes of a trie
    assert computed < 1.15 * needed
    assert computed < 0.75 * whole
    assert seen[-1] == (len(flat(questions)),) * 2
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})


def test_a_diverged_model_gets_no_score(model, questions):
    with pytest.raises(DataError, match="not finite"):
        score_questions(Recording(model, scale=float("nan")), questions, batch_tokens=512)


def test_bf16_is_near_fp32_and_not_the_same(model, scoring_model, questions):
    reference = flat(score_questions(scoring_model, questions))
    rounded = flat(score_questions(NativeModel(lambda: model, precision="bf16"), questions))
    differences = [abs(a.sum_logprob - b.sum_logprob) / a.num_tokens for a, b in zip(reference, rounded, strict=True)]
    assert 1e-4 < max(differences) < 0.2


@pytest.mark.parametrize(("precision", "tf32"), [("fp32", False), ("tf32", True), ("bf16", False)])
def test_tf32_is_what_the_precision_says_and_never_inherited(model, questions, monkeypatch, precision, tf32):
    seen = []
    hidden = model.hidden
    monkeypatch.setattr(
        model, "hidden", lambda *a, **k: seen.append(torch.backends.cuda.matmul.allow_tf32) or hidden(*a, **k)
    )
    try:
        for inherited in (True, False):
            torch.backends.cuda.matmul.allow_tf32 = inherited
            score_questions(NativeModel(lambda: model, precision=precision), questions)
    finally:
        torch.set_float32_matmul_precision("highest")
    assert set(seen) == {tf32}


def _item(gold=0, num_bytes=(4, 8, 8)) -> Item:
    return Item(3, None, gold, (Request((1,), (2,)),) * len(num_bytes), num_bytes, "row", "prompt")


MC = IclTask(label="mc", dataset_uri="x", num_fewshot=(0,), icl_task_type="multiple_choice")
GENERATION = IclTask(label="qa", dataset_uri="x", num_fewshot=(0,), icl_task_type="generation_task_with_answers")
LM = IclTask(label="lm", dataset_uri="x", num_fewshot=(0,), icl_task_type="language_modeling")


def test_the_three_rules_can_pick_three_options():
    scores = [RequestScore(-4.0, 1, False), RequestScore(-6.0, 2, False), RequestScore(-9.0, 9, False)]
    row = item_row(MC, 0, _item(gold=2), scores)
    assert (row["choice_mean"], row["choice_sum"], row["choice_norm"]) == (2, 0, 1)
    assert (row["correct"], row["correct_sum"], row["correct_norm"]) == (True, False, False)
    assert (row["nll"], row["num_tokens"], row["num_choices"], row["item"]) == (9.0, 9, 3, 3)


def test_ties_go_to_the_first_option():
    row = item_row(MC, 0, _item(num_bytes=(5, 5)), [RequestScore(-2.0, 2, False), RequestScore(-2.0, 2, False)])
    assert (row["choice_mean"], row["choice_sum"], row["choice_norm"]) == (0, 0, 0)


def test_a_generated_answer_is_right_by_how_it_begins():
    item = Item(0, None, 0, (), (), "row", "prompt", answers=("The Cat", "dog"))
    for text, right in ((" cat, and more", True), ("Dogs", True), ("a mat", False)):
        row = generation_row(GENERATION, 0, item, Generated(text, 3))
        assert (row["correct"], row["generated"], row["num_tokens"], row["num_choices"]) == (right, text, 3, 1)
        assert not {"nll", "choice_logprobs", "choice_mean", "correct_sum"} & set(row)


def test_language_modeling_needs_every_token():
    for hit in (True, False):
        row = item_row(LM, 0, _item(num_bytes=(4,)), [RequestScore(-1.5, 3, hit)])
        assert row["correct"] is hit
        assert not {"choice_mean", "correct_sum"} & set(row)


def test_accuracy_is_that_of_foundrys_metric(model, scoring_model, tokenizer, home, demo_files):
    """llm-foundry's rule on padded input: lowest perplexity of the continuation positions, first of ties."""
    task = {t.label: t for t in load_suite("demo").icl_tasks}["continuation"]
    items = build_items(task, read_task_file(task, home), 0, tokenizer, 128)
    picked = []
    for item in items:
        perplexities = []
        for r in item.requests:
            ids = torch.zeros(128, dtype=torch.long)
            whole = torch.tensor(r.context_ids + r.continuation_ids)
            ids[: len(whole)] = whole
            span = torch.arange(len(r.context_ids), len(whole))
            with torch.no_grad():
                logits = model(ids[None])[0]
            perplexities.append(nn.functional.cross_entropy(logits[span - 1], ids[span]).exp())
        picked.append(perplexities.index(min(perplexities)))
    scores = score_questions(scoring_model, [item.requests for item in items], batch_tokens=300)
    rows = [item_row(task, 0, item, found) for item, found in zip(items, scores, strict=True)]
    assert [row["choice_mean"] for row in rows] == picked
    assert len(set(picked)) > 1


@pytest.fixture
def evaluate(scoring_model, tokenizer, home, tmp_path, demo_files):
    """score_suite of the demo suite, with anything replaced."""

    def run(**changes):
        settings = {"checkpoint_digest": "weights", "max_seq_len": 128, "batch_tokens": 512} | changes
        arguments = {
            "model": scoring_model,
            "tokenizer": tokenizer,
            "suite": load_suite("demo"),
            "home": home,
            "out_dir": tmp_path / "out",
            "context": CONTEXT,
        }
        for name in set(arguments) & set(settings):
            arguments[name] = settings.pop(name)
        return score_suite(**arguments, **settings)

    return run


ALL = ("last_word/0-shot", "continuation/0-shot", "context_choice/0-shot")


def test_a_suite_gives_one_row_an_item(evaluate, demo_files):
    result = evaluate()
    assert (result.scored, result.reused) == (ALL, ())
    table, recorded = read_items(result.path)
    assert table.equals(result.items)
    assert table.num_rows == 36
    assert table["item"].to_pylist() == [*range(12)] * 3
    assert set(table["suite"].to_pylist()) == {"demo"}
    assert set(table["tokens"].to_pylist()) == {250_000}
    assert recorded["task_files"] == result.task_files
    assert set(result.task_files) == set(ALL)


def test_a_second_evaluation_scores_nothing_again(evaluate, model):
    first = evaluate()
    stamp = first.path.stat().st_mtime_ns
    recording = Recording(model)
    again = evaluate(model=recording)
    assert (again.scored, again.reused, recording.batches) == ((), ALL, [])
    assert again.items.equals(first.items)
    assert first.path.stat().st_mtime_ns == stamp


def test_each_option_is_in_the_table(evaluate, model, tokenizer, home):
    table = evaluate().items
    task = {t.label: t for t in load_suite("demo").icl_tasks}["continuation"]
    items = build_items(task, read_task_file(task, home), 0, tokenizer, 128)
    rows = [row for row in table.to_pylist() if row["task"] == "continuation"]
    for item, row in zip(items, rows, strict=True):
        expected = [plain(model, r)[0] for r in item.requests]
        assert row["choice_logprobs"] == pytest.approx(expected, abs=1e-4)
        assert row["choice_tokens"] == [len(r.continuation_ids) for r in item.requests]
        assert row["nll"] == -row["choice_logprobs"][row["gold"]]
        assert row["choice_sum"] == expected.index(max(expected))
        assert row["generated"] is None


def test_progress_is_told_first_and_last_with_the_time_that_is_left(evaluate):
    lines: list[str] = []
    evaluate(report=lines.append, batch_tokens=1)  # a batch for each of 12 texts, done in far less than a second
    mine = [line for line in lines if line.startswith("last_word")]
    assert len(mine) == 2
    assert "1 of 12 requests" in mine[0] and "left" in mine[0]
    assert "12 of 12 requests" in mine[1] and "left" not in mine[1]
    assert mine[0].facts["done"] == 1


def test_an_evaluation_killed_by_kill_9_resumes_after_its_finished_tasks(evaluate, model, tokenizer, home, tmp_path):
    job = save_job(tmp_path, model, tokenizer, home, "demo")
    job |= {"out": str(tmp_path / "out"), "kill_at": "continuation/0-shot"}
    killed = subprocess.run(
        [sys.executable, score_saved.__file__, json.dumps(job)],
        capture_output=True, text=True, check=False, env={"PYTHONPATH": str(Path(__file__).parents[2])},
    )  # fmt: skip
    assert killed.returncode == -9, killed.stderr
    result = evaluate()
    assert (result.reused, result.scored) == (ALL[:1], ALL[1:])
    assert result.items.equals(evaluate(out_dir=tmp_path / "whole").items)
    assert not list((tmp_path / "out").rglob("*.tmp"))


def test_what_changes_scores_makes_a_task_be_scored_again(evaluate, model, demo_files):
    evaluate()
    lines: list[str] = []
    assert evaluate(checkpoint_digest="other", report=lines.append).scored == ALL
    assert any("checkpoint weights -> other" in line for line in lines)
    assert evaluate(checkpoint_digest="other", max_seq_len=127).scored == ALL
    for precision in ("bf16", "tf32"):
        assert evaluate(model=NativeModel(lambda: model, precision=precision), checkpoint_digest="other").scored == ALL
    evaluate(checkpoint_digest="other", max_seq_len=127)
    path = demo_files["last_word"]
    path.write_text("\n".join(path.read_text().splitlines()[:-1]) + "\n")
    changed = evaluate(checkpoint_digest="other", max_seq_len=127)
    assert (changed.scored, changed.reused) == (ALL[:1], ALL[1:])
    assert changed.items.num_rows == 35


def test_what_does_not_change_scores_is_no_reason_to_score(evaluate):
    evaluate()
    other = evaluate(batch_tokens=9999, context={**CONTEXT, "milestone": "t0500K"})
    assert other.reused == ALL
    assert set(other.items["milestone"].to_pylist()) == {"t0500K"}


def test_a_damaged_task_file_is_scored_again(evaluate):
    result = evaluate()
    stored = result.path.parent / "tasks" / "continuation-0shot.parquet"
    stored.write_bytes(stored.read_bytes()[:100])
    assert evaluate().scored == ("continuation/0-shot",)
    assert pq.read_table(stored).num_rows == 12


def test_a_scorecard_goes_when_its_items_do(evaluate):
    result = evaluate()
    scorecard = result.path.parent / "scorecard.json"
    scorecard.write_text("{}")
    evaluate()
    assert scorecard.exists()
    evaluate(checkpoint_digest="other")
    assert not scorecard.exists()


def test_bad_files_are_found_before_any_forward_pass(evaluate, model, demo_files):
    recording = Recording(model)
    last = demo_files["context_choice"]
    last.write_text(last.read_text() + '{"context_options": []}\n')
    with pytest.raises(DataError, match=r"context_choice\.jsonl, line 13"):
        evaluate(model=recording)
    last.unlink()
    with pytest.raises(MissingInputError, match="context_choice.jsonl"):
        evaluate(model=recording)
    assert recording.batches == []


def test_a_wrong_context_is_found_first(evaluate, model):
    recording = Recording(model)
    with pytest.raises(ValueError, match="context"):
        evaluate(model=recording, context={"run": "demo"})
    assert recording.batches == []


@pytest.mark.parametrize("bias", [False, True])
def test_products_while_scoring_are_of_fp32(bias):
    layer = nn.Linear(512, 300, bias=bias)
    x = torch.randn(2, 9, 512)[:, 3:]  # neither contiguous nor a matrix
    with torch.no_grad():
        expected = copy.deepcopy(layer).double()(x.double())
        with computing(torch.device("cpu"), "fp32"):
            found = layer(x)
    assert (found.dtype, found.shape) == (torch.float32, expected.shape)
    assert (found - expected).abs().max() < 1e-5  # of bf16 or TF32 more than 1e-4
