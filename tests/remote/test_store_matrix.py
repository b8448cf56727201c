"""A home in a store that fails: each stage under each fault, once and for good.

It ends with the right result, or with one line that names cause and next step; the same command without the fault then
leaves in the store what an undisturbed one leaves.
"""

from __future__ import annotations

import itertools
import json
import random
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from commands import Ended, openlm
from faulty_s3 import CUT, DROP, FLIP, FLIP_SENT, SHORT, Bucket
from gloo_workers import forked_trainers

RECIPE = """
name: one
tokenizer: {name: bpe, train: {vocab_size: 300}}
seq_len: 32
samples_per_shard: 512
sources: [{name: web, files: ["raw/web/*.jsonl"]}]
model: {hidden_dim: 32, n_layers: 1, n_heads: 2, vocab_size: 304}
training: {global_batch: 256, lr: 1.0e-2, schedule: constant}
milestones: [1024]
evaluation: {suite: "${OPENLM_RECIPES}/suite/tiny.yaml"}
execution: {log_every: 1}
launcher: {processes: 1}
"""
SUITE = """
name: tiny
icl_tasks: [{label: last_word, dataset_uri: raw/words.jsonl, num_fewshot: [0], icl_task_type: language_modeling}]
"""
STAGES = {
    "tokenize one --workers 1": ("*/raw/*",),
    "train one": ("*/raw/*", "*/tokenizers/*", "*/shards/*"),
    "evaluate one": ("*/raw/*", "*/tokenizers/*", "*/shards/*", "*/runs/*"),
    "report one": ("*/raw/*", "*/tokenizers/*", "*/shards/*", "*/runs/*", "*/scorecards/*"),
}
"""A command -> what the store has before it."""
COMPARED = (".tar", ".sums", ".distcp", ".md", ".csv", "tokenizer.json")
"""Files that are the same wherever and whenever they are made."""
ONCE, FOR_GOOD = 1, 10**6
FAULTS = [
    *itertools.product(("500", "503", CUT, SHORT, FLIP, DROP), ("GET",), (ONCE, FOR_GOOD)),
    *itertools.product(("500", "503", DROP, FLIP_SENT), ("PUT",), (ONCE, FOR_GOOD)),
    *itertools.product(("500", "403"), ("HEAD",), (ONCE, FOR_GOOD)),
]
CELLS = list(itertools.product(STAGES, FAULTS))
SAMPLE = 1 / 16
"""Of the cells, in CI."""


@dataclass(frozen=True)
class Store:
    """A home in a folder of a bucket, and a machine without any of it."""

    bucket: Bucket
    folder: str
    here: Path

    def run(self, command: str) -> Ended:
        variables = {
            "OPENLM_HOME": f"{self.bucket.url}/{self.folder}",
            "OPENLM_HOME_CACHE": str(self.here / "cache"),
            "OPENLM_RECIPES": str(self.here.parent / "recipes"),
            "XDG_CACHE_HOME": str(self.here / "user"),
            "OMP_NUM_THREADS": "1",
        }
        try:
            with forked_trainers():
                return openlm(*command.split(), variables=variables)
        except Exception as e:  # noqa: BLE001 - a traceback is what a cell must not end with
            return Ended(-1, "", f"{type(e).__name__}: {e}")

    def contents(self) -> dict[str, bytes]:
        """Of the files that are the same each time, in the store."""
        names = (n for n in self.bucket.names() if n.startswith(f"{self.folder}/") and n.endswith(COMPARED))
        return {name.removeprefix(self.folder): self.bucket.read(name) for name in names}

    def copy(self, folder: str, patterns: tuple[str, ...]) -> Store:
        """What another machine finds that has nothing yet."""
        for name in self.bucket.names():
            if name.startswith(f"{self.folder}/") and any(Path(name).match(p) or _below(name, p) for p in patterns):
                to = f"{self.bucket.name}/{folder}{name.removeprefix(self.folder)}"
                self.bucket.direct.cp_file(f"{self.bucket.name}/{name}", to)
        return replace(self, folder=folder, here=self.here.parent / folder)


def _below(name: str, pattern: str) -> bool:
    return f"/{pattern.strip('*/')}/" in name


@pytest.fixture
def whole(bucket: Bucket, tmp_path: Path) -> Iterator[Store]:
    """All stages, undisturbed."""
    (tmp_path / "recipes" / "suite").mkdir(parents=True)
    (tmp_path / "recipes" / "suite" / "tiny.yaml").write_text(SUITE)
    (tmp_path / "recipes" / "one.yaml").write_text(RECIPE)
    texts = [p.read_text(errors="replace")[:1500] for p in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[:40]]
    words = [{"context": "import", "continuation": w} for w in ("os", "sys", "re", "json")]

    def rows(of: list[dict[str, Any]]) -> bytes:
        return "".join(json.dumps(row) + "\n" for row in of).encode()

    bucket.put("whole/raw/web/a.jsonl", rows([{"text": text} for text in texts]))
    bucket.put("whole/raw/words.jsonl", rows(words))
    store = Store(bucket, "whole", tmp_path / "whole")
    for command in STAGES:
        ended = store.run(command)
        assert ended.returncode == 0, ended
    yield store


def wrong(whole: Store, cell: tuple[str, tuple[str, str, int]], number: int) -> str | None:
    """What is wrong with a cell."""
    command, (fault, method, times) = cell
    before = STAGES[command]
    later = [patterns for patterns in STAGES.values() if len(patterns) > len(before)]
    done = later[0] if later else (*before, "*/reports/*")
    expected = {name: data for name, data in whole.contents().items() if any(_below(f"x{name}", p) for p in done)}
    store = whole.copy(f"c{number}", before)
    store.bucket.faults.reset()
    store.bucket.faults.set(fault, times, method=method)
    ended = store.run(command)
    met = store.bucket.faults.met
    store.bucket.faults.reset()
    lines = ended.stderr.splitlines()
    if ended.returncode and not (len(lines) == 1 and lines[0].startswith("error: ") and store.folder in lines[0]):
        return f"exit code {ended.returncode}: {ended.stderr}"
    if not ended.returncode and (other := _other(expected, store.contents())):
        return f"SILENT: other {', '.join(other)}, after {met} faults"
    again = store.run(command)
    if again.returncode:
        return f"then exit code {again.returncode}: {again.stderr}"
    other = _other(expected, store.contents())
    return f"SILENT: then other {', '.join(other)}, after {met} faults" if other else None


def _other(expected: dict[str, bytes], found: dict[str, bytes]) -> list[str]:
    return sorted(name for name in {**expected, **found} if expected.get(name) != found.get(name))


def wrong_cells(cells: list, whole: Store) -> list[str]:
    found = []
    for number, cell in enumerate(cells):
        if problem := wrong(whole, cell, number):
            found.append(f"{cell}: {problem}")
    return found


def test_a_store_that_fails_is_named_and_the_same_command_goes_on(whole: Store) -> None:
    """A sample of the cells, drawn by a seed."""
    some = random.Random("store").sample(CELLS, round(len(CELLS) * SAMPLE))
    problems = wrong_cells(sorted(some, key=CELLS.index), whole)
    assert not problems, "\n".join(problems)


@pytest.mark.drill
def test_no_fault_of_a_store_is_silent(whole: Store, record_property: Callable[[str, object], None]) -> None:
    problems = wrong_cells(CELLS, whole)
    silent = sum("SILENT" in problem for problem in problems)
    record_property("counted", f"{len(CELLS)} cells, {len(problems)} wrong, {silent} of them silent")
    assert not problems, "\n".join(problems)
