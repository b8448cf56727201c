"""A function of the user's, through which each document of a source goes before it is tokenized.

A recipe names it, `map: {function: my_maps:clean, version: "1"}`, and whoever runs the recipe lets its module run, with
`OPENLM_MAP_MODULES`: names of modules that Python finds, or paths of `.py` files, with commas between them. Nothing of
a module that is not named there is imported.
"""

import hashlib
import importlib
import importlib.util
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from openlm_pipeline.errors import ConfigError, DataError, nearest
from openlm_pipeline.storage.files import sha256_file

if TYPE_CHECKING:
    from openlm_pipeline.experiments import DocumentMap

ALLOWED = "OPENLM_MAP_MODULES"
_MOST_VALUES, _MOST_REASONS = 10_000, 1_000


@dataclass(frozen=True, slots=True)
class Document:
    """What a function of the user's gets."""

    text: str
    fields: Mapping[str, Any]
    """Those that the recipe names, None where the record has no such field."""


@dataclass(frozen=True, slots=True)
class Drop:
    """What it returns for a document that is to be left out, where it says why; otherwise None will do."""

    reason: str


Mapped = Callable[[str, Mapping[str, Any]], str | Drop]
"""From a record's text and fields, of which there may be more than the function gets."""


def _allowed() -> dict[str, str]:
    """Name of a module -> its path, or "" where Python finds it."""
    entries = [entry.strip() for entry in os.environ.get(ALLOWED, "").split(",") if entry.strip()]
    return {Path(e).stem if e.endswith(".py") else e: e if e.endswith(".py") else "" for e in entries}


def _file_of(spec: "DocumentMap") -> Path:
    """The file of the function's module.

    Raises:
        ConfigError: the module may not run, or is not there.
    """
    name, _, _ = spec.function.partition(":")
    allowed = _allowed()
    if name not in allowed:
        also = ",".join([*filter(None, [os.environ.get(ALLOWED)]), name])
        raise ConfigError(
            f"documents go through {spec.function}, which is code, and {ALLOWED} does not name {name}. Look at the "
            f"module; to let it run, set {ALLOWED}={also}, or give the path of its .py file there"
        )
    if allowed[name]:
        path = Path(allowed[name])
    else:
        try:
            found = importlib.util.find_spec(name)
        except (ImportError, ValueError):
            found = None
        if found is None or not found.has_location:
            raise ConfigError(
                f"there is no module {name}, which {ALLOWED} names; set PYTHONPATH, or its .py file's path"
            )
        path = Path(found.origin)
    if not path.is_file():
        raise ConfigError(f"there is no file {path}, which {ALLOWED} names")
    return path


def map_identity(spec: "DocumentMap") -> dict[str, Any]:
    """What the tokens depend on beside the recipe's settings: the hash of the module's file.

    Raises:
        ConfigError: as for `load_map`.
    """
    return {"map_sha256": sha256_file(_file_of(spec))}


def load_map(spec: "DocumentMap") -> Mapped:
    """The function, checked: it gives a text, or a `Drop`.

    Raises:
        ConfigError: its module may not run, is not there or fails as it is imported, or has no such function.
    """
    path, (name, _, attribute) = _file_of(spec), spec.function.partition(":")
    try:
        module = _module(name, path) if _allowed()[name] else importlib.import_module(name)
    except Exception as e:  # noqa: BLE001 - whatever the user's code raises
        raise ConfigError(f"{path} can't be imported: {type(e).__name__}: {e}") from e
    function = getattr(module, attribute, None)
    if not callable(function):
        known = [key for key, value in vars(module).items() if callable(value) and key[0] != "_"]
        raise ConfigError(f"{path} has no function {attribute!r}; {nearest(attribute, known, 'it has')}")

    def mapped(text: str, fields: Mapping[str, Any]) -> str | Drop:
        made = function(Document(text, {name: fields[name] for name in spec.fields}), **spec.arguments)
        if made is None:
            return Drop("dropped")
        if isinstance(made, Document):
            made = made.text
        if not isinstance(made, (str, Drop)):
            raise TypeError(f"it returned {type(made).__name__}, and not a string, a Document, a Drop or None")
        return made

    return mapped


def _module(name: str, path: Path) -> ModuleType:
    unique = f"openlm_map_{name}_{hashlib.sha256(path.read_bytes()).hexdigest()[:16]}"
    spec = importlib.util.spec_from_file_location(unique, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@dataclass
class Counts:
    """What became of the documents of a part, and what the field of a breakdown says of those that stay."""

    dropped: Counter[str] = field(default_factory=Counter)
    changed: int = 0
    breakdown: dict[str, list[int]] = field(default_factory=dict)
    """Value of the field -> documents, UTF-8 bytes of their text, tokens."""

    def drop(self, reason: str) -> None:
        """
        Raises:
            DataError: there are too many reasons.
        """
        self.dropped[reason] += 1
        if len(self.dropped) > _MOST_REASONS:
            raise DataError(f"the documents' map gives over {_MOST_REASONS:,} reasons; the last is {reason[:80]!r}")

    def keep(self, value: Any, text_bytes: int, tokens: int) -> None:
        """
        Raises:
            DataError: the field has too many values.
        """
        name = value if isinstance(value, str) else "(none)" if value is None else str(value)
        row = self.breakdown.setdefault(name, [0, 0, 0])
        for i, more in enumerate((1, text_bytes, tokens)):
            row[i] += more
        if len(self.breakdown) > _MOST_VALUES:
            raise DataError(f"the field of the breakdown has over {_MOST_VALUES:,} values; the last is {name[:80]!r}")


def largest_first(breakdown: Mapping[str, Sequence[int]]) -> list[tuple[str, Sequence[int]]]:
    """The values of a breakdown with their counts, by their tokens."""
    return sorted(breakdown.items(), key=lambda row: -row[1][2])


def added(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """The sum of counts, or of lists of counts, by name; in alphabetical order."""
    names = sorted({name for part in parts for name in part})
    of = {name: [part[name] for part in parts if name in part] for name in names}
    return {n: [sum(c) for c in zip(*of[n])] if isinstance(of[n][0], list) else sum(of[n]) for n in names}
