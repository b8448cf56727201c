"""Where everything lives under `OPENLM_HOME`, in names people can read; fingerprints never go into paths."""

import os
from dataclasses import dataclass
from pathlib import Path

from openlm_pipeline.errors import ConfigError

DEFAULT_HOME = "openlm_home"


@dataclass(frozen=True)
class Home:
    """The root folder of all state, and the one place that knows its layout."""

    root: Path

    @classmethod
    def from_env(cls) -> "Home":
        """`OPENLM_HOME`, or `./openlm_home`.

        Raises:
            ConfigError: it is a URL; only local paths hold state so far.
        """
        value = os.environ.get("OPENLM_HOME") or DEFAULT_HOME
        if "://" in value:
            raise ConfigError(f"OPENLM_HOME is {value}, but only a local path can hold the state of a pipeline so far")
        return cls(Path(value).absolute())

    def resolve(self, pattern: str) -> str:
        """A path or glob of a recipe: URLs and absolute paths as they are, others below the root."""
        if "://" in pattern or Path(pattern).is_absolute():
            return pattern
        return str(self.root / pattern)

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

    def report(self, run: str, version: str) -> Path:
        return self.root / "reports" / run / version
