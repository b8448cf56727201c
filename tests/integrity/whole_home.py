"""A home that the pipeline itself made, with two of everything, for the tests that damage it."""

from __future__ import annotations

import json
import shlex
import sysconfig
from pathlib import Path

import pytest
from commands import Ended, openlm
from gloo_workers import forked_trainers
from once import made_once

from openlm_pipeline.storage.files import sha256_file

RECIPE = """
name: {name}
tokenizer: {{name: {name}_bpe, train: {{vocab_size: 300}}}}
seq_len: 32
samples_per_shard: 512
sources: [{{name: {data}, files: ["raw/{data}/*.jsonl"], max_bad_fraction: 0.5}}]
model: {{hidden_dim: 32, n_layers: 1, n_heads: 2, vocab_size: 304}}
training: {{global_batch: 256, lr: 1.0e-2, schedule: constant}}
milestones: [1024, 2048]
evaluation: {{suite: "${{OPENLM_HOME}}/raw/suite.yaml"}}
execution: {{log_every: 1, checkpoint_every: 1536}}
launcher: {{processes: 1}}
"""
SUITE = """
name: tiny
icl_tasks:
  - label: last_word
    dataset_uri: raw/tasks/last_word.jsonl
    num_fewshot: [0]
    icl_task_type: language_modeling
    sha256: {sha256}
"""
RUNS = {"one": "web", "two": "code"}
"""Run -> its dataset."""


def variables(root: Path) -> dict[str, str]:
    """The environment in which commands work on a home and its recipes."""
    return {
        "OPENLM_HOME": str(root / "home"),
        "OPENLM_RECIPES": str(root / "recipes"),
        "XDG_CACHE_HOME": str(root / "cache"),
        "OMP_NUM_THREADS": "1",
    }


def run(root: Path, line: str) -> Ended:
    """`openlm LINE` in this process."""
    with forked_trainers():
        return openlm(*shlex.split(line), variables=variables(root))


def last_checkpoint(root: Path, name: str = "one") -> Path:
    return max((root / "home" / "runs" / name / "v1" / "checkpoints").glob("step-*"))


def _make(root: Path) -> None:
    home, recipes = root / "home", root / "recipes"
    recipes.mkdir()
    modules = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    texts = [t for t in (m.read_text(errors="replace")[:1500] for m in modules) if len(t) == 1500]
    for n, (name, data) in enumerate(RUNS.items()):
        (recipes / f"{name}.yaml").write_text(RECIPE.format(name=name, data=data))
        (home / "raw" / data).mkdir(parents=True)
        for file, part in (("a", texts[n:40:4]), ("b", texts[n + 2 : 40 : 4])):
            lines = [json.dumps({"text": text}) for text in part] + ["no JSON"]
            (home / "raw" / data / f"{file}.jsonl").write_text("\n".join(lines) + "\n")
    tasks = home / "raw" / "tasks" / "last_word.jsonl"
    tasks.parent.mkdir()
    words = [line.split()[:3] for line in texts[50].splitlines() if len(line.split()) > 4][:12]
    rows = [{"context": " ".join(line[:-1]), "continuation": line[-1]} for line in words]
    tasks.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (home / "raw" / "suite.yaml").write_text(SUITE.format(sha256=sha256_file(tasks)))
    for name in RUNS:
        scan = f"contamination {name} --workers 1"
        for line in (f"tokenize {name} --workers 1", f"train {name}", f"evaluate {name}", scan, f"report {name}"):
            ended = run(root, line)
            assert ended.returncode == 0, (line, ended)
        tokenizer = home / "tokenizers" / f"{name}_bpe"
        last = last_checkpoint(root, name)
        for form in ("huggingface", "openlm"):
            flags = f"--tokenizer {tokenizer}" if form == "huggingface" else ""
            ended = run(root, f"export {last} -o {home / 'exports' / name / form} --format {form} {flags}")
            assert ended.returncode == 0, ended
        ended = run(root, f"shards export {name} --workers 1 -o {home / 'exports' / name / 'shards'}")
        assert ended.returncode == 0, ended


def make_whole_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The undamaged home, in `home`, and `recipes`, made once; tests work on copies."""
    return made_once(tmp_path_factory, "integrity", _make)
