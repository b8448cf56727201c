"""Fixtures shared by all tests."""

import signal
from pathlib import Path

import pytest

# A shell starts what it puts into the background with Ctrl-C ignored, and so would be all programs under test.
signal.signal(signal.SIGINT, signal.default_int_handler)

pytest_plugins = ["tiny_pipeline", "pretrained", "slurm_cluster"]


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder with real text and evaluation sets, where a developer has it beside the checkout."""
    path = Path(__file__).parents[2] / "shared" / "data"
    if not path.is_dir():
        pytest.skip(f"real text and evaluation sets are not at {path}")
    return path
