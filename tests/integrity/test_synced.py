"""What is written is on the disk before anything says that it is there: files, then the folders that name them."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
from small_run import SmallRun, write_dataset

from openlm_pipeline.evaluation.items import items_table, write_items
from openlm_pipeline.evaluation.scorecard import Scorecard, save_scorecard
from openlm_pipeline.storage.home import Home

SCORECARD = Path(__file__).parents[1] / "compatibility" / "scorecard_0_1_0.json"


@pytest.fixture
def synced(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """What was synced, in this order, by its path below the test's folder and without what makes a name temporary."""
    done: list[str] = []

    def fsync(descriptor: int) -> None:
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        done.append(re.sub(r"(\.[0-9a-f]{8})?\.tmp$", "", os.path.relpath(path, tmp_path)))

    monkeypatch.setattr(os, "fsync", fsync)
    return done


def in_this_order(synced: list[str], *names: str) -> bool:
    """Whether the names are among those synced, each after the one before."""
    rest = iter(synced)
    return all(name in rest for name in names)


def test_a_checkpoint(synced: list[str], tmp_path: Path) -> None:
    small = SmallRun(tmp_path, (2,))
    small.train()
    folder = "home/runs/small/v1/checkpoints"
    before, after = f"{folder}/.tmp-step-00000002", f"{folder}/step-00000002"
    written = {p.name for p in (tmp_path / after).iterdir()}
    assert written > {"COMPLETE", ".metadata", "__0_0.distcp", "checkpoint.json"}
    for name in written - {"COMPLETE"}:
        assert in_this_order(synced, f"{before}/{name}", before, folder, f"{after}/COMPLETE", after), name
    assert in_this_order(synced, "home/runs/small/v1/run.json", "home/runs/small/v1", before)


def test_shards(synced: list[str], tmp_path: Path) -> None:
    write_dataset(Home(tmp_path / "home"), "text", 40, seed=0)
    folder = "home/shards/text/v1"
    for name in ("00000000.tar", "00000000.sums", "00000001.tar", "00000001.sums"):
        last = (f"{folder}/dataset.json", folder, f"{folder}/manifest.jsonl", folder)
        assert in_this_order(synced, f"{folder}/{name}", folder, *last), name
    for folder_above in ("home/shards/text", "home/shards", "home", "."):
        assert folder_above in synced


def test_a_scorecard(synced: list[str], tmp_path: Path) -> None:
    write_items(tmp_path / "items.parquet", items_table([]), {})
    save_scorecard(tmp_path, Scorecard.from_json(SCORECARD.read_bytes()))
    assert in_this_order(synced, "items.parquet", ".", "scorecard.json", ".")
