"""The tiny pipeline with a study of it, `sizes`, and the recipe that it predicts, `larger`."""

import json
from pathlib import Path

import yaml
from tiny_pipeline import TinyPipeline

STUDY = {
    "base": "tiny",
    "models": [{"hidden_dim": d, "n_layers": 1, "n_heads": 2} for d in (8, 16, 24)],
    "tokens": [5120, 10240],
    "cooldown": 0,
    "set": {"validation": {"source": {"name": "held", "files": ["raw/held/*.jsonl"]}, "max_samples": 20}},
    "predict": {"recipe": "larger"},
}


def study_pipeline(root: Path) -> TinyPipeline:
    """Nothing of it is made yet."""
    made = TinyPipeline.create(root)
    rows = [{"text": "a held-out text of some words " * 9} for _ in range(40)]
    (made.home / "raw" / "held").mkdir()
    (made.home / "raw" / "held" / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (made.root / "recipes" / "sizes.study.yaml").write_text(yaml.safe_dump(STUDY))
    larger = {
        "extends": "tiny", "name": "larger", "model": {"hidden_dim": 32, "n_layers": 1}, "milestones": [20480],
        "evaluation": None, **STUDY["set"],
    }  # fmt: skip
    (made.root / "recipes" / "larger.yaml").write_text(yaml.safe_dump(larger))
    return made
