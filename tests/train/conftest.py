"""Fixtures of the trainer's tests."""

from pathlib import Path

import pytest
from small_run import SmallRun


@pytest.fixture
def small(tmp_path: Path) -> SmallRun:
    """A fresh run of 4, then 8 steps."""
    return SmallRun(tmp_path, (4, 8))


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> SmallRun:
    """A run of 4, then 8 steps that has been trained; tests work on copies of its home."""
    small = SmallRun(tmp_path_factory.mktemp("trained"), (4, 8))
    small.train()
    return small
