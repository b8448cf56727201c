"""What every stage of the pipeline gives back, and how it reports."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


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


class ProgressLine(str):
    """A line of progress that also has its numbers and web addresses, for those who store them."""

    facts: dict[str, int | float | str]

    def __new__(cls, text: str, facts: dict[str, int | float | str]) -> "ProgressLine":
        line = super().__new__(cls, text)
        line.facts = facts
        return line


Report = Callable[[str], None]
"""Takes one line for people, such as `2 of 6 files, 12 s left`."""
