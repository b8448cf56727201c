"""Where everything lives under `OPENLM_HOME`, in names people can read; fingerprints never go into paths."""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from openlm_pipeline.errors import ConfigError

if TYPE_CHECKING:
    from openlm_pipeline.storage.sync import HomeSync

DEFAULT_HOME = "openlm_home"
DEFAULT_CACHE = "openlm_home_cache"


@dataclass(frozen=True)
class Home:
    """The root folder of all state, and the one place that knows its layout."""

    root: Path
    """Where work is done: the home itself, or the local copy of one at a URL."""
    url: str | None = None
    """Where finished artefacts go, and come from when they are missing here; None for a local home."""
    cache: Path | None = None
    """Folder of the local copies of homes at URLs, of which `root` is one."""

    @classmethod
    def from_env(cls) -> "Home":
        """`OPENLM_HOME`, or `./openlm_home`. Of a URL the local copy is in a folder of its name below
        `OPENLM_HOME_CACHE`, or `./openlm_home_cache`.

        Raises:
            ConfigError: it is a file, no installed library speaks the URL's protocol, or a password is in it.
        """
        value = os.environ.get("OPENLM_HOME") or DEFAULT_HOME
        if "://" not in value:
            if (root := Path(value).absolute()).is_file():
                raise ConfigError(f"OPENLM_HOME names {root}, which is a file; name a folder")
            return cls(root)
        from openlm_pipeline.storage.remote import (  # slow to import, and a local home needs none of it
            file_system,
            is_remote,
        )

        _, place = file_system(value)
        if not is_remote(value):
            return cls(Path(place).absolute())
        cache = Path(os.environ.get("OPENLM_HOME_CACHE") or DEFAULT_CACHE).absolute()
        parts = [part for part in place.split("/") if part not in ("", ".", "..")]
        return cls(cache.joinpath(*parts), value.rstrip("/"), cache)

    def study(self, name: str) -> Path:
        """The fit of a study and its page."""
        return self.root / "studies" / name

    @property
    def variables(self) -> dict[str, str]:
        """The environment in which another process of this machine has the same home."""
        if self.url is None:
            return {"OPENLM_HOME": str(self.root)}
        return {"OPENLM_HOME": self.url, "OPENLM_HOME_CACHE": str(self.cache)}

    @property
    def sync(self) -> "HomeSync | None":
        """The way between `root` and the home's URL; None for a local home."""
        if self.url is None:
            return None
        from openlm_pipeline.storage.sync import HomeSync  # slow to import, and a local home needs none of it

        return HomeSync(self.root, self.url)

    def push(self, folder: Path) -> None:
        """Send a finished artefact to the home's URL; see `sync.HomeSync.push`. Nothing for a local home."""
        if self.sync is not None:
            self.sync.push(folder)

    def pull(self, folder: Path) -> None:
        """Bring what is at or below a folder from the home's URL, see `HomeSync.pull`. Nothing for a local home."""
        if self.sync is not None:
            self.sync.pull(folder)

    @contextlib.contextmanager
    def artefact(self, folder: Path) -> Iterator[Path]:
        """Pull before a `with` that makes or completes an artefact, and push after it, unless it fails."""
        self.pull(folder)
        yield folder
        self.push(folder)

    def resolve(self, pattern: str) -> str:
        """A path or glob of a recipe: URLs and absolute paths as they are, others below the root, or the home's URL."""
        if "://" in pattern or Path(pattern).is_absolute():
            return pattern
        return str(self.root / pattern) if self.url is None else f"{self.url}/{pattern}"

    def raw(self, corpus: str) -> Path:
        return self.root / "raw" / corpus

    def tokenizer(self, name: str) -> Path:
        return self.root / "tokenizers" / name

    def tokenized(self, dataset: str, version: str) -> Path:
        return self.root / "tokenized" / dataset / version

    def shards(self, dataset: str, version: str) -> Path:
        return self.root / "shards" / dataset / version

    def run(self, run: str, version: str) -> Path:
        return self.root / "runs" / run / version

    def scorecard(self, run: str, version: str, milestone: str) -> Path:
        return self.root / "scorecards" / run / version / milestone

    def model_scorecard(self, name: str, suite: str) -> Path:
        """Scores of a model that no run here made."""
        return self.root / "scorecards" / "models" / name / suite

    def windows(self, suite: str, rule: str) -> Path:
        """The windows of a suite's items that datasets are scanned for."""
        return self.root / "contamination" / "suites" / suite / rule

    def scan(self, dataset: str, version: str, suite: str, rule: str) -> Path:
        """Where windows of a suite's items stand in the shards of a dataset."""
        return self.root / "contamination" / "datasets" / dataset / version / suite / rule

    def report(self, run: str, version: str) -> Path:
        return self.root / "reports" / run / version
