"""What each process does in the tests of scoring by several.

The folder has `model.pt`, `tokenizer.json`, `suite.yaml` and the task files. Each process writes the error that the
second scoring, whose model fails on the last process only, ended with.
"""

import os
from pathlib import Path

import torch
from tokenizers import Tokenizer

from openlm_pipeline.errors import OpenLMError
from openlm_pipeline.evaluation.model import NativeModel
from openlm_pipeline.evaluation.scorer import score_suite
from openlm_pipeline.evaluation.suite import load_suite
from openlm_pipeline.models.config import ModelConfig
from openlm_pipeline.models.transformer import Transformer
from openlm_pipeline.storage.home import Home

CONTEXT = {"run": "demo", "run_version": "v1", "milestone": "t0250K", "step": 31, "tokens": 250_000}


def load(folder: Path) -> Transformer:
    saved = torch.load(folder / "model.pt", weights_only=True)
    model = Transformer(ModelConfig(**saved["config"]))
    model.load_state_dict(saved["state"])
    return model


def fail() -> Transformer:
    raise OpenLMError("these weights are unreadable")


def score(folder: Path, out: Path, last: bool) -> None:
    """Score the suite; report to `report-RANK.txt`."""
    with Path(f"{out}-report-{os.environ.get('RANK', 0)}.txt").open("w") as lines:
        score_suite(
            NativeModel(fail if last else lambda: load(folder)),
            Tokenizer.from_file(str(folder / "tokenizer.json")),
            load_suite(folder / "suite.yaml"),
            Home(folder),
            out,
            CONTEXT,
            checkpoint_digest="weights",
            max_seq_len=128,
            batch_tokens=100,
            report=lambda line: print(line, file=lines),
        )


def score_and_fail(folder: Path) -> None:
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    score(folder, folder / f"of-{size}", last=False)
    try:
        score(folder, folder / f"broken-{size}", last=rank == size - 1)
    except OpenLMError as e:
        (folder / f"error-{size}-{rank}.txt").write_text(f"{type(e).__name__}: {e}")
