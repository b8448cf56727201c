"""LLM Foundry itself and the native scorer give the same table: every prompt, every choice, every verdict.

That LLM Foundry's prompts are, token for token, those prepared here is checked by its backend for every item.
"""

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from tokenizers import Tokenizer

from openlm_pipeline.checkpoints.model_export import export_huggingface
from openlm_pipeline.evaluation.foundry.backend import has_only_our_code, score_suite_with_foundry
from openlm_pipeline.evaluation.foundry.environment import FoundryError
from openlm_pipeline.evaluation.huggingface import HuggingFaceModel
from openlm_pipeline.evaluation.model import NativeModel, ScoringModel
from openlm_pipeline.evaluation.scorer import score_suite
from openlm_pipeline.evaluation.suite import Suite
from openlm_pipeline.models.config import ModelConfig
from openlm_pipeline.models.transformer import Transformer
from openlm_pipeline.storage.home import Home

EOT = "<|endoftext|>"
TEXT = "the cat sat on a mat and then it ran to see what dog did with its red ball in our big old house"
WORDS = TEXT.split()
CONTEXT = {"run": "demo", "run_version": "v1", "milestone": "t0250K", "step": 31, "tokens": 250_000}
SAME = ("task", "num_fewshot", "category", "item", "item_hash", "prompt_hash", "gold", "metric", "num_tokens")
VERDICTS = ("choice_mean", "choice_sum", "choice_norm", "correct", "correct_sum", "correct_norm", "generated")


def sentence(i: int, length: int) -> str:
    return " ".join(WORDS[(7 * i + 3 * j) % len(WORDS)] for j in range(length))


def score_by_both(
    model: ScoringModel, folder: Path, tokenizer: Tokenizer, tasks: list[dict[str, Any]], root: Path, python: Path
) -> tuple[pa.Table, pa.Table]:
    """The tables of the native scorer and of LLM Foundry."""
    suite, home = Suite(name="parity", icl_tasks=tasks), Home(root)
    settings: dict[str, Any] = {"checkpoint_digest": "weights", "max_seq_len": 128}
    native = score_suite(model, tokenizer, suite, home, root / "native", CONTEXT, **settings)
    foundry = score_suite_with_foundry(
        folder, suite, home, root / "foundry", CONTEXT, tokenizer=tokenizer, python=python, **settings
    )
    assert foundry.scored == native.scored
    return native.items, foundry.items


def differences(native: pa.Table, foundry: pa.Table, names: tuple[str, ...]) -> list[str]:
    pairs = zip(native.to_pylist(), foundry.to_pylist(), strict=True)
    return [
        f"{a['task']}/{a['num_fewshot']}-shot, item {a['item']}: {name} {a[name]!r}, in LLM Foundry {b[name]!r}"
        for (a, b), name in itertools.product(pairs, names)
        if a[name] != b[name]
    ]


def largest_gap(native: pa.Table, foundry: pa.Table) -> float:
    """Between mean cross-entropies of an option, in nats per token."""
    columns = ("choice_logprobs", "choice_tokens")
    mine, theirs = (
        [p / n for row in t.to_pylist() for p, n in zip(*(row[c] or [] for c in columns))] for t in (native, foundry)
    )
    return max(abs(a - b) for a, b in zip(mine, theirs, strict=True))


@pytest.fixture(scope="module")
def tokenizer_with_eot(tokenizer: Tokenizer) -> Tokenizer:
    copy = Tokenizer.from_str(tokenizer.to_str())
    copy.add_special_tokens([EOT])
    return copy


@pytest.fixture(scope="module")
def trained(tokenizer_with_eot: Tokenizer) -> Transformer:
    """A small model that mostly knows which word follows which."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Transformer(ModelConfig(hidden_dim=64, n_layers=2, n_heads=2, seq_len=128, vocab_size=384))
        rows = [tokenizer_with_eot.encode(sentence(i, 64)).ids[:64] for i in range(len(WORDS))]
        ids = torch.tensor(rows)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        for _ in range(60):
            logits = model(ids[:, :-1])
            torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).backward()
            optimizer.step()
            optimizer.zero_grad()
    return model.eval()


@pytest.fixture(scope="module")
def exported(trained: Transformer, tokenizer_with_eot: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported")
    tokenizer_with_eot.save(str(folder / "source.json"))
    return export_huggingface(trained, folder / "model", folder / "source.json", eot=EOT)


def invented_rows(kind: str) -> list[dict[str, Any]]:
    """Twelve rows of a task type, with white space where LLM Foundry strips it and where it does not."""
    rows = []
    for i in range(12):
        text, category = sentence(i, 4 + i % 5), f"group {i % 3}"
        following = [sentence(i + j, 6 + i % 5).split(" ", 4 + i % 5)[-1] for j in range(4)]
        if kind == "multiple_choice":
            turn = i % 4  # what follows stands at a place of its own, and is not always called right
            row = {
                "query": text + "\n",
                "choices": following[turn:] + following[:turn],
                "gold": -turn % 4 if turn else 1,
            }
        elif kind == "schema":
            row = {"context_options": [text, sentence(i + 5, 3)], "continuation": following[0], "gold": i % 2}
        elif kind == "language_modeling":
            row = {"context": text + " ", "continuation": following[0] if i % 3 else WORDS[i]}
        else:
            row = {"context": text, "answer": following[0] if i % 3 else WORDS[i], "aliases": [WORDS[i + 1]]}
        rows.append(row | {"category": category})
    return rows


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "glued": {"continuation_delimiter": "Answer: "},
    "lines": {"continuation_delimiter": "\nAnswer: ", "example_delimiter": "\n\n", "question_prelimiter": "Q: "},
    "told": {"prompt_string": "Say what follows.\n", "fewshot_random_seed": 7, "question_prelimiter": "- "},
    "as_is": {"strip_dataset": False, "continuation_delimiter": " -> "},
    "grouped": {"has_categories": True},
    "short": {"max_seq_len": 24},
}
GENERATION: dict[str, dict[str, Any]] = {
    "stops": {"early_stopping_criteria": ["the", "a b"], "generation_kwargs": {"max_new_tokens": 12}},
    "thoughts": {"cot_delimiter": " so ", "do_normalization": False},
}
TYPES = ("multiple_choice", "schema", "language_modeling", "generation_task_with_answers")


@pytest.fixture(scope="module")
def both(
    trained: Transformer,
    exported: Path,
    tokenizer_with_eot: Tokenizer,
    tmp_path_factory: pytest.TempPathFactory,
    foundry_python: Path,
) -> tuple[pa.Table, pa.Table]:
    """All task types with all prompt options, without and with few-shot rows."""
    root = tmp_path_factory.mktemp("parity")
    tasks = []
    for kind in TYPES:
        (root / f"{kind}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in invented_rows(kind)))
        options = OPTIONS | (GENERATION if kind == TYPES[-1] else {})
        for name, option in options.items():
            task = {"label": f"{kind}-{name}", "icl_task_type": kind, "dataset_uri": f"{kind}.jsonl"}
            tasks.append(task | {"num_fewshot": [0, 3]} | option)
    return score_by_both(NativeModel(lambda: trained), exported, tokenizer_with_eot, tasks, root, foundry_python)


def test_an_exported_checkpoint_scores_the_same_item_by_item(both):
    assert differences(*both, SAME) == []
    assert differences(*both, VERDICTS) == []
    assert largest_gap(*both) < 1e-4


def test_the_invented_rows_tell_right_from_wrong(both):
    """Equality means something only where not all items fare alike."""
    table = both[1].to_pylist()
    for kind in TYPES:
        correct = [row["correct"] for row in table if row["task"].startswith(kind)]
        assert 0.1 < sum(correct) / len(correct) < 0.9, kind
    assert len({row["generated"] for row in table}) > 10


def test_code_of_a_model_is_run_only_if_it_is_ours(exported, tmp_path):
    assert has_only_our_code(exported)
    copy = shutil.copytree(exported, tmp_path / "copy")
    with (copy / "modeling_openlm.py").open("a") as f:
        f.write("print()\n")
    assert not has_only_our_code(copy)
    assert not has_only_our_code(tmp_path)
    (copy / "modeling_openlm.py").unlink()
    (copy / "more").mkdir()
    (copy / "more" / "modeling_other.py").write_text("")
    assert not has_only_our_code(copy)


def test_prompts_of_another_tokenizer_are_refused(exported, tokenizer_with_eot, tmp_path, foundry_python):
    other = Tokenizer.from_str(tokenizer_with_eot.to_str())
    other.add_tokens(["mats"])
    rows = [{"context": "the cat sat on", "continuation": word} for word in ("a mat", "two mats")]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {"label": "mats", "icl_task_type": "language_modeling", "dataset_uri": "rows.jsonl", "num_fewshot": [0]}
    with pytest.raises(FoundryError, match=r"rows.jsonl, line 2 \(task mats/0-shot\): .*prompt is not the one"):
        score_suite_with_foundry(
            *(exported, Suite(name="parity", icl_tasks=[task]), Home(tmp_path), tmp_path / "out", CONTEXT),
            tokenizer=other,
            checkpoint_digest="weights",
            max_seq_len=128,
            python=foundry_python,
        )
    assert not (tmp_path / "out" / "items.parquet").exists()


GLUED = {"continuation_delimiter": "Answer: "}
NEWLINE = {"continuation_delimiter": "\nAnswer: "}
FEWSHOT = {"num_fewshot": [3]}
SLICES: dict[str, tuple[str, str, int, int, int, dict[str, Any]]] = {
    # Short rows, since LLM Foundry computes padding too. Task: file, type, rows, their characters and tokens at most.
    "copa": ("copa", "multiple_choice", 16, 180, 24, {}),
    "winograd": ("winograd_wsc", "schema", 8, 250, 24, {}),
    "winograd_3": ("winograd_wsc", "schema", 4, 200, 72, FEWSHOT),
    "piqa": ("piqa", "multiple_choice", 8, 250, 28, GLUED),
    "piqa_newline": ("piqa", "multiple_choice", 8, 250, 28, NEWLINE),
    "lambada": ("lambada_openai", "language_modeling", 8, 350, 84, {}),
    "arc_easy": ("arc_easy", "multiple_choice", 4, 250, 32, GLUED),
    "arc_easy_3": ("arc_easy", "multiple_choice", 4, 200, 76, NEWLINE | FEWSHOT),
    "jeopardy": ("jeopardy_all", "language_modeling", 8, 160, 32, GLUED),
    "jeopardy_3": ("jeopardy_all", "language_modeling", 8, 160, 100, NEWLINE | FEWSHOT | {"has_categories": True}),
    "triviaqa": ("triviaqa_sm_sub", "generation_task_with_answers", 6, 400, 44, NEWLINE),
}


def test_a_pretrained_model_scores_the_same_item_by_item(smollm2, shared_data, tmp_path, foundry_python):
    tasks = []
    for label, (file, kind, num_rows, max_chars, max_seq_len, settings) in SLICES.items():
        lines = (shared_data / "eval" / f"{file}.jsonl").read_text().splitlines(keepends=True)
        short = [line for line in lines if len(line) <= max_chars]
        path = tmp_path / f"{label}.jsonl"
        path.write_text("".join(short[:: len(short) // num_rows][:num_rows]))  # from all over: some files are in order
        task = {"label": label, "icl_task_type": kind, "dataset_uri": str(path), "max_seq_len": max_seq_len}
        tasks.append(task | {"num_fewshot": [0]} | settings)
    tokenizer = Tokenizer.from_file(str(smollm2 / "tokenizer.json"))
    model = HuggingFaceModel(str(smollm2))
    native, foundry = score_by_both(model, smollm2, tokenizer, tasks, tmp_path, foundry_python)
    assert native.num_rows == sum(num_rows for _, _, num_rows, *_ in SLICES.values())
    assert differences(native, foundry, SAME) == []
    assert differences(native, foundry, VERDICTS) == []
    assert largest_gap(native, foundry) < 2e-3
