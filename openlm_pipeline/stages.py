"""The pipeline as plain functions, one a stage: what both the `openlm` command and the Dagster assets call.

Each stage looks at what is on disk, does only what is missing or no longer matches, and says whether it reused what
was there. `version` is the content hash that the next stage depends on. No stage needs Dagster.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from openlm_pipeline.experiments import Dataset, Experiment
from openlm_pipeline.layout import Home


@dataclass(frozen=True)
class StageResult:
    """What a stage made or found."""

    path: Path
    version: str
    """Content hash: equal results have equal versions."""
    reused: bool
    """True if nothing had to be done."""
    facts: dict[str, Any] = field(default_factory=dict)
    """Numbers and strings worth showing, JSON-serialisable; units stand in the names."""


@dataclass(frozen=True)
class RawFile:
    """One raw file of a dataset."""

    name: str
    """Base name, unique in its dataset; the partition key."""
    url: str
    size_bytes: int
    stamp: str
    """Changes when the file does: size and modification time, or the store's etag."""


@dataclass(frozen=True)
class TrainingProgress:
    """A record of `metrics.jsonl`."""

    step: int
    tokens: int
    metrics: dict[str, float]
    """loss, lr, grad_norm, tokens_per_second, ..."""


@dataclass(frozen=True)
class MilestoneReached:
    """A milestone's checkpoint is complete on disk."""

    label: str
    tokens: int
    checkpoint: StageResult


Report = Callable[[str], None]
"""Takes one line for people, such as `2 of 6 files, 1.2M tokens/s`."""
