"""A source's `exclude`: a list of records of raw files that are left out, such as `openlm contamination` writes.

One JSON object a line: `source` (any where there is none), `file` (name of the raw file), `offset` (where in it the
record begins, as `Record.offset`), and `reason`, by which it is counted; other keys are for people.
"""

import hashlib
import os
from dataclasses import dataclass
from functools import lru_cache

import orjson

from openlm_pipeline.errors import ConfigError
from openlm_pipeline.storage.remote import is_remote, open_remote

REASON = "excluded"


@dataclass(frozen=True)
class Excluded:
    """A list that was read."""

    sha256: str
    records: dict[tuple[str | None, str], dict[int, str]]
    """(source, raw file) -> offset -> reason."""

    def of(self, source: str, file: str) -> dict[int, str]:
        """Offset -> reason of the records of a raw file."""
        return self.records.get((None, file), {}) | self.records.get((source, file), {})


def read_excluded(place: str) -> Excluded:
    """The list at a path or URL; it is read again only where the file was changed.

    Raises:
        MissingInputError: it is not there.
        ConfigError: a line is none of such a list; it is named.
    """
    stamp = () if is_remote(place) or not os.path.exists(place) else os.stat(place)[6:9]  # noqa: PTH110, PTH116
    return _read(place, stamp)


@lru_cache(maxsize=4)
def _read(place: str, stamp: tuple[float, ...]) -> Excluded:
    with open_remote(place, "list of records to leave out") as f:
        content = f.read()
    found: dict[tuple[str | None, str], dict[int, str]] = {}
    for number, line in enumerate(content.splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = orjson.loads(line)
            file, offset, reason = str(row["file"]), int(row["offset"]), str(row.get("reason") or REASON)
        except (ValueError, TypeError, KeyError, AttributeError) as e:
            raise ConfigError(
                f"{place}, line {number} is no record to leave out, an object with `file` and `offset`: {e!r}"
            ) from e
        found.setdefault((row.get("source"), file), {})[offset] = reason
    return Excluded(hashlib.sha256(content).hexdigest(), found)
