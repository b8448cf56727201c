"""What every stage of the pipeline gives back, how it reports, and what it does only with consent."""

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from openlm_pipeline.errors import ConfigError, ConsentError, nearest

CONSENTS = {
    "supersede": "set aside what was made from other settings or data, and make it again",
    "remake": "set a damaged milestone aside, and train it again",
    "cpu": "train without a GPU what would take days",
    "memory": "train although a step seems not to fit into memory",
    "disk": "start although the disk seems too small",
    "unscored": "train although files of its evaluation are missing",
    "whole": "train all of a large recipe in a run that is not its own job",
    "extend": "continue a run whose schedule has ended at the rates of a longer one",
    "rate": "train at a learning rate that jumps, climbs or is 0",
    "repeat_data": "train on the same text many times over",
}
"""What is done only where `--allow` or the run tag `openlm/allow` names it."""
ALLOW_TAG = "openlm/allow"


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


Say = Callable[[str], None]
"""Takes one line for people, such as `2 of 6 files, 12 s left`."""


@dataclass(frozen=True)
class Finding:
    """One thing that a look ahead has to say."""

    level: Literal["ok", "warning", "refusal"]
    what: str
    next: str = ""
    """What to do about it; empty if nothing need be done."""
    consent: str | None = None
    """One of `CONSENTS`, with which a refusal is none."""

    def line(self) -> str:
        """For people."""
        return f"{self.level}: {self.what}" + (f". {self.next}" if self.next else "")


def parse_allow(names: str | Collection[str] | None) -> frozenset[str]:
    """The consents in `supersede,remake`, or in several such texts.

    Raises:
        ConfigError: there is no such consent; the message names the nearest.
    """
    texts = [names] if isinstance(names, str) else names or []
    found = [name.strip() for text in texts for name in text.split(",") if name.strip()]
    for name in found:
        if name not in CONSENTS:
            raise ConfigError(f"there is no consent {name!r} to allow; {nearest(name, CONSENTS)}")
    return frozenset(found)


def refusal(consent: str, what: str, otherwise: str) -> Finding:
    """A refusal that names both ways on.

    Args:
        what: what is there and how it differs.
        otherwise: the way on that needs no consent, as a sentence without its end.
    """
    allow = f"allow it: `--allow {consent}`, or in Dagster the run tag {ALLOW_TAG}={consent}"
    return Finding("refusal", what, f"{otherwise}; or, to {CONSENTS[consent]}, {allow}.", consent)


def refuse(findings: Iterable[Finding], allow: Collection[str]) -> None:
    """Refuse where a look ahead found what is not allowed.

    Raises:
        ConsentError: names every refusal that no consent covers, each with the ways on.
    """
    left = [f for f in findings if f.level == "refusal" and f.consent not in allow]
    if left:
        raise ConsentError("\n".join(f"{f.what}\n{f.next}" for f in left))
