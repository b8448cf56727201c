"""The embedded corpus, made once for all tests of this folder; a server to download from."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from faulty_server import DATA, FaultyServer, serve

from openlm_pipeline.corpus.download import RemoteFile, download_files
from openlm_pipeline.corpus.embedded import build_embedded
from openlm_pipeline.result import StageResult
from openlm_pipeline.storage.home import Home


@pytest.fixture(scope="session")
def embedded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Home, StageResult]:
    home = Home(Path(tmp_path_factory.mktemp("embedded_home")))
    return home, build_embedded(home, lambda line: None)


@pytest.fixture
def server() -> Iterator[FaultyServer]:
    with serve() as running:
        running.files["/a.jsonl"] = DATA
        yield running


@pytest.fixture
def fetch(server: FaultyServer, tmp_path: Path) -> Callable[..., dict[str, RemoteFile]]:
    """Downloads paths of the server into `tmp_path` without waiting between attempts."""

    def run(*paths: str, **options: Any) -> dict[str, RemoteFile]:
        settings = {"retry_wait_seconds": 0.0, "timeout_seconds": 5.0, "report": lambda line: None, **options}
        return download_files([server.url + path for path in paths or ("/a.jsonl",)], tmp_path, **settings)

    return run
