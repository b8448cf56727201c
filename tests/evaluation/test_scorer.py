"""Scores are those of one plain forward pass a request, however they are batched; finished tasks are not redone."""

import json

import pyarrow.parquet as pq
import pytest
import torch
from torch import nn

from openlm_pipeline.errors import DataError, MissingInputError
from openlm_pipeline.evaluation.items import read_items
from openlm_pipeline.evaluation.scorer import RequestScore, item_row, score_requests, score_suite
from openlm_pipeline.evaluation.suite import IclTask, load_suite
from openlm_pipeline.evaluation.tasks import Item, Request, build_items, read_task_file

CONTEXT = {"run": "demo", "run_version": "v1", "milestone": "t0250K", "step": 31, "tokens": 250_000}


def plain(model, request: Request) -> tuple[float, bool]:
    """The definition: one request, no padding, all logits."""
    with torch.no_grad():
        ids = torch.tensor([request.context_ids + request.continuation_ids])
        logprobs = model(ids)[0].double().log_softmax(-1)
    first = len(request.context_ids)
    picked = [(logprobs[first + j - 1], t) for j, t in enumerate(request.continuation_ids)]
    return sum(float(lp[t]) for lp, t in picked), all(int(lp.argmax()) == t for lp, t in picked)


@pytest.fixture(scope="module")
def requests() -> list[Request]:
    g = torch.Generator().manual_seed(1)

    def ids(n):
        return tuple(torch.randint(0, 320, (n,), generator=g).tolist())

    lengths = torch.randint(1, 40, (60, 2), generator=g).tolist()
    made = [Request(ids(c), ids(t)) for c, t in lengths]
    shared = ids(20)
    made += [Request(shared, (token,)) for token in (5, 9, 5, 300)]  # options of one token share their input
    return made + [Request(shared[:-1], (shared[-1], 7))]


def greedy(model, context: tuple[int, ...], n: int) -> Request:
    out = list(context)
    with torch.no_grad():
        for _ in range(n):
            out.append(int(model(torch.tensor([out]))[0, -1].argmax()))
    return Request(context, tuple(out[len(context) :]))


def test_scores_are_those_of_single_forward_passes(model, requests):
    requests = [*requests, greedy(model, (1, 2, 3), 4)]
    scores = score_requests(model, requests, batch_tokens=512)
    for request, score in zip(requests, scores, strict=True):
        total, hit = plain(model, request)
        assert score.sum_logprob == pytest.approx(total, abs=1e-4, rel=1e-5)
        assert score.num_tokens == len(request.continuation_ids)
        assert score.all_argmax == hit
    assert scores[-1].all_argmax
    assert not all(s.all_argmax for s in scores)


@pytest.mark.parametrize("batch_tokens", [1, 64, 333, 100_000])
def test_scores_do_not_depend_on_batching_or_order(model, requests, batch_tokens):
    reference = score_requests(model, requests, batch_tokens=512)
    batched = score_requests(model, requests[::-1], batch_tokens=batch_tokens)[::-1]
    for a, b in zip(reference, batched, strict=True):
        assert a.sum_logprob / a.num_tokens == pytest.approx(b.sum_logprob / b.num_tokens, abs=1e-5)
        assert a.all_argmax == b.all_argmax


class Recording(nn.Module):
    """Passes everything on and remembers what shapes went through."""

    def __init__(self, model):
        super().__init__()
        self.inner, self.batches, self.positions = model, [], 0

    def hidden(self, ids):
        self.batches.append(tuple(ids.shape))
        return self.inner.hidden(ids)

    def output(self, x):
        self.positions += len(x)
        return self.inner.output(x)


def test_little_is_computed_in_vain(model, requests):
    recording, seen = Recording(model), []
    score_requests(recording, requests, batch_tokens=400, progress=lambda done, total: seen.append((done, total)))
    assert all(b * s <= 400 for b, s in recording.batches)
    assert recording.positions == sum(len(r.continuation_ids) for r in requests)
    distinct = {r.context_ids + r.continuation_ids[:-1] for r in requests}
    assert sum(b for b, _ in recording.batches) == len(distinct) < len(requests)
    needed = sum(len(ids) for ids in distinct)
    assert sum(b * s for b, s in recording.batches) < 1.15 * needed
    assert seen[-1] == (len(requests), len(requests))
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})


def test_a_diverged_model_gets_no_score(model, requests):
    broken = Recording(model)
    broken.output = lambda x: model.output(x) * float("nan")
    with pytest.raises(DataError, match="not finite"):
        score_requests(broken, requests, batch_tokens=512)


def _item(gold=0, num_bytes=(4, 8, 8)) -> Item:
    return Item(3, None, gold, (Request((1,), (2,)),) * len(num_bytes), num_bytes, "row", "prompt")


MC = IclTask(label="mc", dataset_uri="x", num_fewshot=(0,), icl_task_type="multiple_choice")
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


def test_language_modeling_needs_every_token():
    for hit in (True, False):
        row = item_row(LM, 0, _item(num_bytes=(4,)), [RequestScore(-1.5, 3, hit)])
        assert row["correct"] is hit
        assert not {"choice_mean", "correct_sum"} & set(row)


def test_accuracy_is_that_of_foundrys_metric(model, tokenizer, home, demo_files):
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
    requests = [r for item in items for r in item.requests]
    scores = iter(score_requests(model, requests, batch_tokens=300))
    rows = [item_row(task, 0, item, [next(scores) for _ in item.requests]) for item in items]
    assert [row["choice_mean"] for row in rows] == picked
    assert len(set(picked)) > 1


@pytest.fixture
def evaluate(model, tokenizer, home, tmp_path, demo_files):
    """score_suite of the demo suite, with anything replaced."""

    def run(**changes):
        settings = {"checkpoint_digest": "weights", "max_seq_len": 128, "batch_tokens": 512, "device": "cpu"} | changes
        arguments = {
            "model": model,
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


class Killed(Exception):
    pass


def test_a_killed_evaluation_resumes_after_its_finished_tasks(evaluate, model):
    def kill_in_second_task(line: str) -> None:
        if line.startswith("continuation/0-shot"):
            raise Killed

    with pytest.raises(Killed):
        evaluate(report=kill_in_second_task)
    result = evaluate()
    assert (result.reused, result.scored) == (ALL[:1], ALL[1:])
    assert result.items.equals(evaluate(out_dir=result.path.parent.parent / "whole").items)


def test_what_changes_scores_makes_a_task_be_scored_again(evaluate, demo_files, tmp_path):
    evaluate()
    lines: list[str] = []
    assert evaluate(checkpoint_digest="other", report=lines.append).scored == ALL
    assert any("checkpoint weights -> other" in line for line in lines)
    assert evaluate(checkpoint_digest="other", max_seq_len=127).scored == ALL
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


def test_a_tolerant_evaluation_says_what_it_left_out(evaluate, demo_files):
    demo_files["last_word"].unlink()
    demo_files["continuation"].write_text(json.dumps({"query": "q"}) + "\n")
    result = evaluate(tolerant=True)
    assert result.scored == ALL[2:]
    assert set(result.not_run) == {ALL[0]}
    assert set(result.failed) == {ALL[1]}
    assert "last_word.jsonl" in result.not_run[ALL[0]]


def test_a_wrong_context_is_found_first(evaluate, model):
    recording = Recording(model)
    with pytest.raises(ValueError, match="context"):
        evaluate(model=recording, context={"run": "demo"})
    assert recording.batches == []
