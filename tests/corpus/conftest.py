"""The embedded corpus, made once for all tests of this folder."""

from pathlib import Path

import pytest

from openlm_pipeline.corpus.embedded import build_embedded
from openlm_pipeline.layout import Home
from openlm_pipeline.result import StageResult


@pytest.fixture(scope="session")
def embedded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Home, StageResult]:
    home = Home(Path(tmp_path_factory.mktemp("embedded_home")))
    return home, build_embedded(home, lambda line: None)
