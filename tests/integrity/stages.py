"""The stages as people start them, in this process, each with what it made: for tests that disturb them.

A result names no place, so that results of the same root can be compared.
"""

from __future__ import annotations

import contextlib
import io
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from commands import Ended
from small_run import as_trainer
from whole_home import last_checkpoint, run, variables

import train.__main__
from openlm_pipeline.runs.folder import RunFolder
from openlm_pipeline.storage.files import read_json, sha256_file

Result = dict[str, object]
Stage = Callable[[Path], tuple[Ended, Result]]


def contents(folder: Path, *patterns: str) -> Result:
    """The hash of each file."""
    paths = sorted(p for pattern in patterns for p in folder.glob(pattern) if p.is_file() and p.name != ".lock")
    return {str(p.relative_to(folder)): sha256_file(p) for p in paths}


def scores(folder: Path) -> Result:
    """The items of each task below a folder, with what its scorecard makes of them."""
    found = {}
    for path in sorted(folder.rglob("items.parquet")):
        found[str(path.relative_to(folder))] = pq.read_table(path).to_pylist()
        card = read_json(path.with_name("scorecard.json"))
        found[str(path.relative_to(folder)) + " card"] = [card[name] for name in ("tasks", "averages", "changes")]
    return found


def tokenize(root: Path) -> tuple[Ended, Result]:
    ended = run(root, "tokenize one --workers 1")
    return ended, contents(root / "home", "shards/web/v1/*", "tokenizers/one_bpe/*.json")


def train_one(root: Path) -> tuple[Ended, Result]:
    """What `torchrun -m train one` does, in this process."""
    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, as_trainer(), contextlib.redirect_stderr(said):
        for name, value in variables(root).items():
            patch.setenv(name, value)
        patch.setattr(sys, "argv", ["train", "one"])
        patch.setattr(train.__main__, "die_with_parent", lambda: None)
        patch.setattr(train.__main__.gc, "freeze", lambda: None)
        code = train.__main__.main()
    return Ended(code, "", said.getvalue()), {} if code else _trained(root)


def launch(root: Path) -> tuple[Ended, Result]:
    """`openlm train one`, which starts a trainer and watches it."""
    ended = run(root, "train one")
    return ended, {} if ended.returncode else _trained(root)


def _trained(root: Path) -> Result:
    folder = RunFolder(root / "home" / "runs" / "one" / "v1")
    losses = {record["step"]: record["loss"] for record in folder.read_metrics()}
    return {"losses": losses, **{str(c.step): (c.milestone, c.weights_digest) for c in folder.saved()}}


def evaluate(root: Path) -> tuple[Ended, Result]:
    ended = run(root, "evaluate one")
    return ended, {} if ended.returncode else scores(root / "home" / "scorecards" / "one")


def report(root: Path) -> tuple[Ended, Result]:
    return run(root, "report one"), contents(root / "home" / "reports" / "one" / "v1", "*.html", "*.md", "*.csv")


def export(root: Path) -> tuple[Ended, Result]:
    out, tokenizer = root / "home" / "exported", root / "home" / "tokenizers" / "one_bpe"
    ended = run(root, f"export {last_checkpoint(root)} -o {out} --tokenizer {tokenizer}")
    return ended, contents(out, "*")


def export_openlm(root: Path) -> tuple[Ended, Result]:
    """As OpenLM's log folder."""
    out = root / "home" / "exported"
    return run(root, f"export {last_checkpoint(root)} -o {out} --format openlm"), contents(out, "**/*")


def generate(root: Path) -> tuple[Ended, Result]:
    ended = run(root, "generate one@2.048K --prompt import --max-tokens 4 --greedy")
    return ended, {"said": ended.stdout}


def plan(root: Path) -> tuple[Ended, Result]:
    ended = run(root, "plan one")
    return ended, {"said": ended.stdout}


def gc(root: Path) -> tuple[Ended, Result]:
    ended = run(root, "gc --apply --token-streams")
    return ended, contents(root / "home", "runs/**/*", "tokenized/**/*", "shards/**/*")


def fsck(root: Path) -> tuple[Ended, Result]:
    """After a shard was damaged."""
    ended = run(root, "fsck --repair")
    return ended, contents(root / "home", "shards/**/*")


LATER: dict[Stage, tuple[str, ...]] = {
    tokenize: ("tokenizers", "tokenized", "shards", "runs", "scorecards", "reports", "exports"),
    train_one: ("runs", "scorecards", "reports", "exports"),
    launch: ("runs", "scorecards", "reports", "exports"),
    evaluate: ("scorecards", "reports", "exports"),
    report: ("reports", "exports"),
    export: ("exports",),
    export_openlm: ("exports",),
    generate: (),
    plan: (),
    gc: (),
    fsck: (),
}
"""A stage -> what is not in the home before it."""


def before(stage: Stage, whole: Path, root: Path) -> None:
    """A home that has all but what a stage and those after it make."""
    shutil.copytree(whole, root)
    for name in LATER[stage]:
        shutil.rmtree(root / "home" / name, ignore_errors=True)
