"""Blocks of a Markdown file that are generated, between `<!-- openlm:begin NAME -->` and `<!-- openlm:end NAME -->`."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from openlm_pipeline.errors import ConfigError, MissingInputError
from openlm_pipeline.storage.files import write_text

_MARKER = re.compile(r"<!--\s*openlm:(\w+)\s*(.*?)\s*-->")


def block_names(path: Path) -> list[str]:
    """Names of a file's blocks, in order.

    Raises:
        MissingInputError: there is no such file.
        ConfigError: a marker is misspelt, or a block is not closed, nested or there twice.
    """
    return [name for name, _, _ in _blocks(path, _read(path))]


def update_blocks(path: Path, tables: Mapping[str, str]) -> list[str]:
    """Put each text into the file's block of its name; names of the blocks that changed. Other text stays as it is.

    Raises:
        MissingInputError: there is no such file.
        ConfigError: as `block_names`, or a block has no text in `tables`.
    """
    text, changed = _filled(path, tables)
    if changed:
        write_text(path, text)
    return changed


def check_blocks(path: Path, tables: Mapping[str, str]) -> list[str]:
    """Names of the blocks that `update_blocks` would change; the file stays as it is. Raises as that does."""
    return _filled(path, tables)[1]


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise MissingInputError(f"{path} does not exist") from None


def _filled(path: Path, tables: Mapping[str, str]) -> tuple[str, list[str]]:
    text = _read(path)
    parts, changed, end = [], [], 0
    for name, start, stop in _blocks(path, text):
        if name not in tables:
            raise ConfigError(f"{path}: nothing is known to fill the block {name!r} with; known: {', '.join(tables)}")
        body = f"\n{tables[name].strip()}\n"
        if text[start:stop] != body:
            changed.append(name)
        parts += [text[end:start], body]
        end = stop
    return "".join([*parts, text[end:]]), changed


def _blocks(path: Path, text: str) -> Iterator[tuple[str, int, int]]:
    """Name, and where its content begins and ends."""
    names: set[str] = set()
    opened: tuple[str, int] | None = None
    for match in _MARKER.finditer(text):
        word, name = match[1], match[2]
        where = f"{path}, line {text.count(chr(10), 0, match.start()) + 1}"
        if word == "begin" and opened is None and name and name not in names:
            names.add(name)
            opened = (name, match.end())
        elif word == "end" and opened is not None and opened[0] == name:
            yield name, opened[1], match.start()
            opened = None
        elif word == "begin" and opened is not None:
            raise ConfigError(f"{where}: block {name!r} begins inside of {opened[0]!r}, which is not closed")
        elif word == "begin":
            raise ConfigError(f"{where}: block {name!r} is there twice, or has no name")
        elif word == "end":
            raise ConfigError(f"{where}: block {name!r} ends and was not begun")
        else:
            raise ConfigError(f"{where}: `openlm:{word}` is no marker; there are openlm:begin and openlm:end")
    if opened is not None:
        raise ConfigError(f"{path}: block {opened[0]!r} is not closed by <!-- openlm:end {opened[0]} -->")
