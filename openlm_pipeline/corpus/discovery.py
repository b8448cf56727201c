"""Which raw files a dataset has: globs of its source, expanded on any file system that fsspec knows."""

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fsspec.implementations.local import LocalFileSystem

from openlm_pipeline.corpus.formats import format_of
from openlm_pipeline.errors import MissingInputError
from openlm_pipeline.experiments import Dataset
from openlm_pipeline.experiments.spec import Source
from openlm_pipeline.storage.home import Home
from openlm_pipeline.storage.remote import file_system, open_remote, public, storage_errors

_HASH_KEYS = ("ETag", "etag", "md5", "content_md5")
_STAMP_KEYS = (*_HASH_KEYS, "mtime", "LastModified", "last_modified", "created")
LIST = "@"
"""Begins the name of a file that lists raw files, one path, URL or glob per line."""


@dataclass(frozen=True)
class RawFile:
    """One raw file of a dataset."""

    name: str
    """Its path below the folders that the pattern names, unique in its dataset; the partition key."""
    url: str
    size_bytes: int
    stamp: str
    """Changes when the file does: size and modification time, or the store's etag."""
    format: str | None = None
    """The suffix as which it is read, where its name does not say it."""


def _raw_file(fs: Any, info: dict[str, Any], name: str, format: str | None) -> RawFile:
    path, size = info["name"], int(info["size"] or 0)
    if isinstance(fs, LocalFileSystem):
        about = Path(path).stat()  # of what a link points at
        return RawFile(name, path, about.st_size, f"{about.st_size}-{about.st_mtime_ns}", format)
    if not any(info.get(k) for k in _HASH_KEYS):  # a store's listing has them; else each file is asked for
        info = fs.info(path)
    mark = next((str(info[k]).strip('"') for k in _STAMP_KEYS if info.get(k)), None) or fs.ukey(path)
    return RawFile(name, fs.unstrip_protocol(path), size, f"{size}-{mark}", format)


def _is_file(info: dict[str, Any], where: str) -> bool:
    """Whether a listed thing is a file, or a link to one.

    Raises:
        MissingInputError: it is a link to nothing.
    """
    if not info.get("islink"):
        return info["type"] == "file"
    path = Path(info["name"])
    if not path.exists():
        raise MissingInputError(
            f"raw file {path} is a broken link: there is no {path.readlink()}. It matches {public(where)}; bring its "
            "file back, or remove the link"
        )
    return path.is_file()


def _literal_prefix(path: str, wild: str) -> str:
    """The folders of a pattern before the first with a wildcard, with the slash behind them."""
    first = min((path.find(c) for c in wild if c in path), default=len(path))
    return path[: path.rfind("/", 0, first) + 1]


@dataclass(frozen=True)
class Match:
    """The files that one path, URL or glob stands for."""

    prefix: str
    """Folders that none of its wildcards are in, with the slash behind them."""
    fs: Any
    infos: list[dict[str, Any]]


def expand_pattern(where: str) -> Match:
    """What one path, URL or glob stands for, empty if there is nothing.

    Raises:
        MissingInputError: a link that matches is broken.
    """
    fs, path = file_system(where)
    # A question mark in a web address begins its query. Only a local path may be looked up by listing.
    wild = "*" if where.startswith(("http://", "https://")) else "*?["
    if isinstance(fs, LocalFileSystem) and os.path.lexists(path):
        wild = ""  # a name with brackets that is there as it stands
    prefix = _literal_prefix(path, wild)
    try:
        with storage_errors(public(where), "can't be listed"):
            fs.invalidate_cache()  # a listing kept by a long process may be old
            found = list(fs.glob(path, detail=True).values()) if any(c in path for c in wild) else [fs.info(path)]
            if not any(c in path for c in wild) and found[0]["type"] == "directory":
                prefix = f"{path.rstrip('/')}/"
                below = fs.find(path, detail=True).values()
                found = [info for info in below if not _is_hidden(info["name"][len(prefix) :])]
    except MissingInputError:
        broken_link = isinstance(fs, LocalFileSystem) and Path(path).is_symlink()
        found = [{"name": path, "islink": True}] if broken_link else []
    return Match(prefix, fs, [info for info in found if _is_file(info, where)])


def _is_hidden(path: str) -> bool:
    """Whether a name in a path says that it is no data: `_SUCCESS`, `.part-00000.crc`."""
    return any(name.startswith(("_", ".")) for name in path.split("/"))


def _patterns(source: Source, home: Home) -> Iterator[str]:
    """The source's patterns, and those in the files that it names with `@`."""
    for pattern in source.files:
        if not pattern.startswith(LIST):
            yield home.resolve(pattern)
            continue
        url = home.resolve(pattern[len(LIST) :])
        with open_remote(url, "list of raw files") as file, storage_errors(public(url), "can't be read"):
            lines = [line.strip() for line in file.read().decode().splitlines()]
        listed = [line for line in lines if line and not line.startswith("#")]
        if not listed:
            raise MissingInputError(f"{public(url)} lists no raw files")
        yield from map(home.resolve, listed)


def restat(raw: RawFile) -> RawFile:
    """The raw file as it is now.

    Raises:
        MissingInputError: it is gone.
    """
    fs, path = file_system(raw.url)
    fs.invalidate_cache()
    with storage_errors(f"raw file {public(raw.url)}", "can't be looked up"):
        return _raw_file(fs, fs.info(path), raw.name, raw.format)


def discover(dataset: Dataset, home: Home) -> list[RawFile]:
    """The raw files of a dataset, sorted by name: a file's path below the folders that its pattern names.

    Files of one name that several patterns match are named by their paths below what all patterns have in common. In a
    dataset of an earlier release, which named files by base names, those that it holds keep them.

    Raises:
        MissingInputError: a pattern matches nothing; says where it looked and how to set it. Or a link is broken.
        ConfigError: a suffix or protocol can't be read.
    """
    source = dataset.source
    matches = {place: expand_pattern(place) for place in _patterns(source, home)}
    if missing := [place for place, match in matches.items() if not match.infos]:
        raise MissingInputError(_nothing_found(source.name, missing, embedded=source.origin == "embedded"))
    by_path: dict[str, tuple[Match, dict[str, Any]]] = {}
    for match in matches.values():
        for info in match.infos:
            by_path.setdefault(info["name"], (match, info))
    names = {path: path[len(match.prefix) :] for path, (match, _) in by_path.items()}
    if len(set(names.values())) < len(names):
        common = os.path.commonpath([match.prefix for match in matches.values()]).rstrip("/")
        names = {path: path[len(common) :].lstrip("/") for path in names}
    names = _as_recorded(names, home.tokenized(dataset.name, dataset.version))
    files = [_raw_file(match.fs, info, names[path], source.format) for path, (match, info) in by_path.items()]
    for file in files:
        format_of(file.url, file.format)
    return sorted(files, key=lambda file: file.name)


def _as_recorded(names: dict[str, str], tokenized: Path) -> dict[str, str]:
    """`names` by path, with the base name where an earlier release has the file's tokens under it."""
    bases = Counter(name.rpartition("/")[2] for name in names.values())
    kept = {}
    for path, name in names.items():
        base = name.rpartition("/")[2]
        recorded = base != name and bases[base] == 1 and not (tokenized / f"{name}.json").exists()
        kept[path] = base if recorded and (tokenized / f"{base}.json").exists() else name
    return kept


def _nothing_found(source: str, places: list[str], *, embedded: bool) -> str:
    looked = "\n".join(f"  {public(place)}" for place in places)
    message = f"source {source!r} has patterns that match no raw file:\n{looked}\n"
    if embedded:
        return message + "This corpus is made on this machine by the corpus stage, which `openlm demo` runs first."
    home = "set" if os.environ.get("OPENLM_HOME") else "not set"
    return message + (
        "Put the files there, or name them: a path, a glob, a folder or an fsspec URL such as s3://bucket/*.jsonl.zst, "
        "as --input-files, or as a recipe's sources.files. A shipped recipe takes them from the environment variable "
        f"OPENLM_RAW_DATA; a recipe's relative paths start at OPENLM_HOME ({home})."
    )
