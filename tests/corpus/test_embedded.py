"""The embedded corpus is large enough, the same each time, and keeps held-out text out of training."""

import json
import os
import re
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from openlm_pipeline.corpus.embedded import build_embedded
from openlm_pipeline.corpus.heldout_tasks import MAX_CONTEXT_CHARS
from openlm_pipeline.corpus.python_text import KINDS, docstrings
from openlm_pipeline.corpus.reader import RecordReader
from openlm_pipeline.errors import BusyError
from openlm_pipeline.result import StageResult
from openlm_pipeline.storage.files import folder_lock, sha256_file
from openlm_pipeline.storage.home import Home

Embedded = tuple[Home, StageResult]


def fail(bad: object) -> None:
    raise AssertionError(bad)


def texts(folder: Path) -> list[str]:
    return [r.text for path in sorted(folder.glob("*.zst")) for r in RecordReader(str(path), on_bad=fail)]


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_it_is_large_and_has_every_kind(embedded: Embedded) -> None:
    _, made = embedded
    train = texts(made.path / "train")
    assert 15e6 <= sum(len(t.encode()) for t in train) == made.facts["train_text_bytes"] <= 24e6
    assert len(train) == made.facts["train_documents"]
    assert all(made.facts[f"{kind}_documents"] > 20 for kind in KINDS)
    assert len(list((made.path / "train").glob("*.jsonl.zst"))) == 6
    json.dumps(made.facts)


def test_no_document_is_twice_and_held_out_modules_are_not_trained_on(embedded: Embedded) -> None:
    _, made = embedded
    train, heldout = texts(made.path / "train"), texts(made.path / "heldout")
    everything = Counter(train + heldout)
    assert max(everything.values()) == 1
    share = sum(map(len, heldout)) / sum(map(len, train))
    assert 0.015 < share < 0.08


def test_no_path_of_this_machine_is_in_the_corpus(embedded: Embedded) -> None:
    home, made = embedded
    here = (sys.prefix, sys.base_prefix, str(Path.home()) + "/", str(home.root))
    for text in texts(made.path / "train") + texts(made.path / "heldout"):
        assert not any(path in text for path in here if len(path) > len("/usr/local"))


def test_made_again_in_another_process_it_is_the_same_byte_for_byte(embedded: Embedded, tmp_path: Path) -> None:
    _, made = embedded
    code = "import sys, pathlib; from openlm_pipeline.storage.home import Home; " \
        "from openlm_pipeline.corpus.embedded import build_embedded; " \
        "build_embedded(Home(pathlib.Path(sys.argv[1])), print)"  # fmt: skip
    environment = {**os.environ, "PYTHONHASHSEED": "7", "PYTHONPATH": str(Path(__file__).parents[2])}
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, env=environment)

    def digests(folder: Path) -> dict[str, str]:
        return {str(p.relative_to(folder)): sha256_file(p) for p in folder.rglob("*.json*")}

    assert digests(tmp_path / "raw" / "embedded") == digests(made.path)
    assert len(digests(made.path)) == 6 + 1 + 3 + 1


def test_a_second_run_reuses_it_at_once(embedded: Embedded) -> None:
    home, made = embedded
    said: list[str] = []
    start = time.process_time()  # not the clock on the wall: others may be busy
    again = build_embedded(home, said.append)
    assert time.process_time() - start < 1
    assert again.reused and (again.version, again.facts) == (made.version, made.facts)
    assert "reused" in said[-1]


@pytest.mark.parametrize("damage", ["flipped byte", "lost file", "other identity", "broken manifest"])
def test_damage_or_another_environment_makes_it_again(embedded: Embedded, tmp_path: Path, damage: str) -> None:
    """Only the decision is watched here: the lock of a maker is held, so that making starts and stops at once."""
    _, made = embedded
    folder = Home(tmp_path).raw("embedded")
    for file in made.path.rglob("*.json*"):
        copy = folder / file.relative_to(made.path)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(file.read_bytes())
    assert build_embedded(Home(tmp_path), print).reused
    manifest, shard = folder / "corpus.json", folder / "train" / "03.jsonl.zst"
    if damage == "flipped byte":
        data = bytearray(shard.read_bytes())
        data[1000] ^= 1
        shard.write_bytes(data)
    elif damage == "lost file":
        shard.unlink()
    elif damage == "other identity":
        manifest.write_text(re.sub(r'"numpy": "[^"]*"', '"numpy": "1.0"', manifest.read_text()))
    else:
        manifest.write_text(manifest.read_text()[:100])
    said: list[str] = []
    with folder_lock(folder, "testing"), pytest.raises(BusyError):
        build_embedded(Home(tmp_path), said.append)
    assert {"other identity": "environment.numpy 1.0 ->", "broken manifest": "can't be used"}.get(
        damage, "missing or damaged"
    ) in said[0]


def test_last_word_rows(embedded: Embedded) -> None:
    items = rows(embedded[1].path / "eval" / "last_word.jsonl")
    assert len(items) >= 200
    for item in items:
        assert item.keys() == {"context", "continuation"}
        assert re.search(rf"\b{item['continuation']}\b", item["context"]), "the word must stand in its context"
        assert item["context"] == item["context"].strip() and len(item["context"]) <= MAX_CONTEXT_CHARS


def test_continuation_rows(embedded: Embedded) -> None:
    items = rows(embedded[1].path / "eval" / "continuation.jsonl")
    assert len(items) >= 250
    for item in items:
        assert item.keys() == {"query", "choices", "gold"}
        assert len(set(item["choices"])) == 4 and all(len(c.split()) == 10 for c in item["choices"])
        assert len(item["query"]) <= MAX_CONTEXT_CHARS
    assert max(Counter(i["gold"] for i in items).values()) <= len(items) / 4 + 1
    heldout = [" ".join(t.split()) for t in texts(embedded[1].path / "heldout")]
    for item in items[:50]:
        passage = f"{item['query']} {item['choices'][item['gold']]}"
        assert sum(passage in text for text in heldout) >= 1
        for i, wrong in enumerate(item["choices"]):
            assert i == item["gold"] or not any(f"{item['query']} {wrong}" in text for text in heldout)


def test_context_choice_rows(embedded: Embedded) -> None:
    items = rows(embedded[1].path / "eval" / "context_choice.jsonl")
    assert len(items) >= 120
    for item in items:
        assert item.keys() == {"context_options", "continuation", "gold"}
        assert len(set(item["context_options"])) == 2
        assert all(len(option) <= MAX_CONTEXT_CHARS for option in item["context_options"])
    assert abs(sum(i["gold"] for i in items) - len(items) / 2) <= 1


def test_task_passages_do_not_stand_in_training_text(embedded: Embedded) -> None:
    train = "\n".join(" ".join(t.split()) for t in texts(embedded[1].path / "train"))
    items = rows(embedded[1].path / "eval" / "continuation.jsonl")[::8]
    seen = [i for i in items if f"{i['query']} {i['choices'][i['gold']]}" in train]
    assert len(seen) <= len(items) / 20, seen  # a paragraph may be quoted inside another one


def test_docstrings_come_under_their_signatures() -> None:
    source = (
        '"""About."""\nclass A:\n    """An A."""\n    def f(self, x):\n        """Does f."""\n    def g(self): pass\n'
    )
    assert docstrings(source, "stdlib/pkg/mod.py") == (
        "Module pkg.mod\n\nAbout.\n\n\nclass A\n\nAn A.\n\n\nA.f(self, x)\n\nDoes f."
    )
