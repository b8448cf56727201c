"""Fixtures shared by all tests."""

import gc
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from once import run_folder

# A shell starts what it puts into the background with Ctrl-C ignored, and so would be all programs under test.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Tests kill processes, never the machine: what they write need not reach the disk, for which all of them would wait.
os.fsync = lambda descriptor: None

pytest_plugins = ["tiny_pipeline", "pretrained", "slurm_cluster"]


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder with real text and evaluation sets, where a developer has it beside the checkout."""
    path = Path(__file__).parents[2] / "shared" / "data"
    if not path.is_dir():
        pytest.skip(f"real text and evaluation sets are not at {path}")
    return path


def pytest_collection_finish(session: pytest.Session) -> None:
    """All that was imported stays; without this each full collection of garbage walks through it again."""
    gc.collect()
    gc.freeze()


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """What tests counted and recorded as the property `counted`, whichever process ran them; and the kills in all."""
    reports = [r for kind in ("passed", "failed") for r in terminalreporter.stats.get(kind, ())]
    found = [(r.nodeid, dict(r.user_properties)) for r in reports if r.when == "call" and r.user_properties]
    for test, properties in found:
        terminalreporter.write_line(f"{test.rpartition('::')[2]}: {properties.get('counted')}")
    if kills := [properties["kills"] for _, properties in found if "kills" in properties]:
        valid, equal = map(sum, zip(*kills))
        terminalreporter.write_line(f"{valid} valid kills, {equal} of them byte-equal afterwards")


def pytest_sessionfinish(session: pytest.Session) -> None:
    if "gloo_workers" in sys.modules:
        sys.modules["gloo_workers"].stop()


@pytest.fixture(scope="session", autouse=True)
def compile_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What torch compiles is kept for all tests of this run, and only for it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(run_folder(tmp_path_factory) / "cache"))
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(run_folder(tmp_path_factory) / "compiled"))
        patch.setenv("TORCHINDUCTOR_COMPILE_THREADS", "1")  # here: more start a pool of processes that import torch
        yield
