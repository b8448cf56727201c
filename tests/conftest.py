"""Fixtures shared by all tests."""

from pathlib import Path

import pytest

pytest_plugins = ["tiny_pipeline", "pretrained"]


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder with real text and evaluation sets, where a developer has it beside the checkout."""
    path = Path(__file__).parents[2] / "shared" / "data"
    if not path.is_dir():
        pytest.skip(f"real text and evaluation sets are not at {path}")
    return path
