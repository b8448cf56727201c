"""Checksum files as `sha256sum`, `md5sum` and their kin write them, and hashes of files on disk."""

import hashlib
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from openlm_pipeline.errors import ConfigError

_ALGORITHM_BY_DIGITS = {32: "md5", 40: "sha1", 64: "sha256", 128: "sha512"}
_PLAIN = re.compile(r"(?P<digest>[0-9A-Fa-f]+) [ *]?(?P<path>.+)")
_TAGGED = re.compile(r"[A-Z0-9-]+ \((?P<path>.+)\) = (?P<digest>[0-9A-Fa-f]+)")
_BLOCK_BYTES = 1 << 20


@dataclass(frozen=True)
class Checksum:
    """One line of a checksum file."""

    path: str
    algorithm: str
    """Name that `hashlib` knows."""
    hexdigest: str


def parse_line(line: str) -> Checksum | None:
    """A line such as `HASH  NAME`, `HASH *NAME` or `SHA256 (NAME) = HASH`; None if it is none of them."""
    match = _TAGGED.fullmatch(line) or _PLAIN.fullmatch(line)
    if not match or not (algorithm := _ALGORITHM_BY_DIGITS.get(len(match["digest"]))):
        return None
    return Checksum(match["path"], algorithm, match["digest"].lower())


def parse_checksums(text: str, where: str) -> list[Checksum]:
    """All lines of a checksum file but empty ones and `#` comments; `where` names the file in errors.

    Raises:
        ConfigError: a line is not a checksum line, or there is none at all.
    """
    found = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        if not (checksum := parse_line(line.strip())):
            raise ConfigError(
                f"{where}, line {number} is not a checksum line. Expected the form of sha256sum or md5sum: "
                "a hexadecimal hash, two blanks, a file name."
            )
        found.append(checksum)
    if not found:
        raise ConfigError(f"{where} has no checksums")
    return found


def checksum_for(url: str, checksums: Iterable[Checksum], where: str) -> Checksum:
    """The checksum of the file at `url`: by base name, and by the folders before it where base names repeat.

    Raises:
        ConfigError: there is none, or several differ.
    """
    parts = PurePosixPath(url).parts
    named = [c for c in checksums if PurePosixPath(c.path).name == parts[-1]]
    if len({c.hexdigest for c in named}) > 1:
        paths = [(c, PurePosixPath(c.path).parts) for c in named]
        named = [c for c, own in paths if parts[-len(own) :] == own]
    if not named:
        raise ConfigError(f"{where} has no checksum for {parts[-1]} of {url}; nothing was fetched")
    if len({c.hexdigest for c in named}) > 1:
        raise ConfigError(f"{where} has several different checksums for {parts[-1]}; nothing was fetched")
    return named[0]


def hash_file(path: Path, algorithms: Iterable[str], before_block: Callable[[], None] = lambda: None) -> dict[str, str]:
    """Hex digests of a file by algorithm, in one reading; `before_block` may raise to end it early."""
    hashes = {name: hashlib.new(name, usedforsecurity=False) for name in algorithms}
    with path.open("rb") as f:
        while block := f.read(_BLOCK_BYTES):
            before_block()
            for digest in hashes.values():
                digest.update(block)
    return {name: digest.hexdigest() for name, digest in hashes.items()}
