"""A small tokenizer, a small model and small task files, all real."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from openlm_pipeline.evaluation.model import NativeModel
from openlm_pipeline.evaluation.results import SuiteResult
from openlm_pipeline.evaluation.scorecard import Provenance, Scorecard, make_scorecard
from openlm_pipeline.evaluation.scorer import score_suite
from openlm_pipeline.evaluation.suite import Suite
from openlm_pipeline.models.config import ModelConfig
from openlm_pipeline.models.transformer import Transformer
from openlm_pipeline.storage.home import Home

torch.set_num_threads(1)  # matrices of this size only lose by more
TEXT = "the cat sat on a mat and then it ran to see what the dog did with its red ball in our big old house"
WORDS = TEXT.split()


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    """Byte-level BPE of 320 ids, with a token for " a"."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    bpe.train_from_iterator([" ".join(WORDS[i:] + WORDS[:i]) for i in range(len(WORDS))], trainer)
    return bpe


@pytest.fixture(scope="session")
def model() -> Transformer:
    config = ModelConfig(hidden_dim=32, n_layers=2, n_heads=2, seq_len=128, vocab_size=320)
    generator = torch.Generator().manual_seed(0)
    model = Transformer(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2, generator=generator)
    return model.eval()


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path / "home")


@pytest.fixture
def write_rows(home: Home) -> Callable[[str, list[dict[str, Any]]], Path]:
    """Write a task file below the home's root."""

    def write(name: str, rows: list[dict[str, Any]]) -> Path:
        path = home.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    return write


@pytest.fixture
def scored(home: Home, tokenizer: Tokenizer) -> Callable[..., tuple[Scorecard, SuiteResult]]:
    """Score a suite with a model; its scorecard and its items."""

    def score(
        suite: Suite, model: Transformer, max_seq_len: int, by: Tokenizer = tokenizer
    ) -> tuple[Scorecard, SuiteResult]:
        context = {"run": "r", "run_version": None, "milestone": None, "step": None, "tokens": None}
        how = {"checkpoint_digest": "x", "max_seq_len": max_seq_len}
        result = score_suite(NativeModel(lambda: model), by, suite, home, home.root / "out", context, **how)
        card = make_scorecard(
            result.items,
            None,
            suite=suite,
            provenance=Provenance(run="r", checkpoint_digest="x", tokenizer="t"),
            task_files=result.task_files,
            warnings=result.warnings,
        )
        return card, result

    return score


def sentence(i: int, length: int = 6) -> str:
    return " ".join(WORDS[(7 * i + 3 * j) % len(WORDS)] for j in range(length))


@pytest.fixture
def task_rows() -> dict[str, list[dict[str, Any]]]:
    """Twelve rows of each task type."""
    return {
        "last_word": [{"context": sentence(i, 4 + i), "continuation": WORDS[i]} for i in range(12)],
        "continuation": [
            {"query": sentence(i), "choices": [sentence(i + j, 2 + j % 3) for j in range(1, 5)], "gold": i % 4}
            for i in range(12)
        ],
        "context_choice": [
            {"context_options": [sentence(i), sentence(i + 5)], "continuation": sentence(i + 2, 3), "gold": i % 2}
            for i in range(12)
        ],
    }


@pytest.fixture
def demo_files(write_rows, task_rows) -> dict[str, Path]:
    """The three files of the demo suite."""
    return {name: write_rows(f"raw/embedded/eval/{name}.jsonl", rows) for name, rows in task_rows.items()}
