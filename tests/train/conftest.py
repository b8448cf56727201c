"""Fixtures of the trainer's tests."""

from pathlib import Path

import pytest
from small_run import SmallRun


@pytest.fixture
def small(tmp_path: Path) -> SmallRun:
    """A fresh run of 4, then 8 steps."""
    return SmallRun(tmp_path, (4, 8))
