"""Clusters and small datasets for the tests of the data engine."""

import contextlib
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from gloo_workers import forked_workers
from small_dataset import SmallDataset, documents

from openlm_pipeline.pools import DaskSettings, Pool, PoolFactory
from openlm_pipeline.result import Say


@pytest.fixture(scope="session", autouse=True)
def forked() -> Iterator[None]:
    with forked_workers():
        yield


@pytest.fixture(scope="session")
def inline() -> PoolFactory:
    """All in this process."""
    return DaskSettings(workers=1).pool


@pytest.fixture(scope="module")
def two_workers() -> Iterator[PoolFactory]:
    """A real cluster of two worker processes, kept for the tests of a file only: it is busy even when idle."""
    with DaskSettings(workers=2).pool(lambda line: None) as pool:
        yield lambda report: contextlib.nullcontext(pool)


@pytest.fixture
def no_client() -> PoolFactory:
    """For stages that must find nothing to do."""

    def refuse(report: Say) -> contextlib.AbstractContextManager[Pool]:
        raise AssertionError("a stage asked for a cluster though all was done")

    return refuse


@pytest.fixture(scope="session")
def small_bpe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE tokenizer of 400 ids, trained as an experiment trains its own."""
    made = SmallDataset(
        tmp_path_factory.mktemp("small_bpe"), {"tokenizer": {"name": "small_bpe", "train": {"vocab_size": 400}}}
    )
    made.write({"a.jsonl": documents(60)})
    return made.tokenizer().path


@pytest.fixture
def small(tmp_path: Path, small_bpe: Path) -> Callable[..., SmallDataset]:
    """Makes a dataset in a folder of the test's own, with a ready tokenizer and no raw files yet."""

    def make(folder: str = "home", settings: dict[str, Any] | None = None, **source: Any) -> SmallDataset:
        made = SmallDataset(tmp_path / folder, settings or {}, source)
        made.root.mkdir(exist_ok=True)
        shutil.copy(small_bpe, made.root / "small_bpe.json")
        return made

    return make


@pytest.fixture
def three_files(small: Callable[..., SmallDataset]) -> SmallDataset:
    """Three raw files of unequal size, enough for several shards."""
    made = small()
    made.write({"a.jsonl": documents(20), "b.jsonl": documents(35, 100), "c.jsonl": documents(8, 200)})
    return made
