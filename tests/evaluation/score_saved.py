"""A process, or one of torchrun's, that scores a saved model over a suite: `python score_saved.py JSON`.

It dies by SIGKILL at the first line of progress that starts with `kill_at`. The model of process `broken_rank` gives
NaN. The first process prints what is reported.
"""

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

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


def save_job(folder: Path, model: Transformer, tokenizer: Tokenizer, home: Home, suite: str) -> dict[str, Any]:
    """Write what the process needs; its job but for `out`."""
    torch.save({"config": model.config.model_dump(), "state": model.state_dict()}, folder / "model.pt")
    tokenizer.save(str(folder / "tokenizer.json"))
    return {
        "model": str(folder / "model.pt"),
        "tokenizer": str(folder / "tokenizer.json"),
        "home": str(home.root),
        "suite": suite,
    }


def run(job: dict[str, Any]) -> None:
    torch.set_num_threads(1)

    def load() -> Transformer:
        saved = torch.load(job["model"], weights_only=True)
        model = Transformer(ModelConfig(**saved["config"]))
        model.load_state_dict(saved["state"])
        if str(job.get("broken_rank")) == os.environ.get("RANK"):
            model.output.weight.data.fill_(float("nan"))
        return model

    def report(line: str) -> None:
        print(line, flush=True)
        if "kill_at" in job and line.startswith(job["kill_at"]):
            os.kill(os.getpid(), signal.SIGKILL)

    score_suite(
        NativeModel(load),
        Tokenizer.from_file(job["tokenizer"]),
        load_suite(job["suite"]),
        Home(Path(job["home"])),
        Path(job["out"]),
        CONTEXT,
        checkpoint_digest="weights",
        max_seq_len=128,
        batch_tokens=256,
        report=report,
    )


if __name__ == "__main__":
    try:
        run(json.loads(sys.argv[1]))
    except OpenLMError as e:
        print(f"{os.environ.get('RANK')}: {type(e).__name__}: {e}", flush=True)
        raise
