"""Which raw files a dataset has: globs of its source, expanded on any file system that fsspec knows."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fsspec.implementations.local import LocalFileSystem

from openlm_pipeline.corpus.formats import format_of
from openlm_pipeline.errors import ConfigError, MissingInputError
from openlm_pipeline.experiments import Dataset
from openlm_pipeline.storage.home import Home
from openlm_pipeline.storage.remote import file_system, public, storage_errors

_STAMP_KEYS = ("ETag", "etag", "md5", "content_md5", "mtime", "LastModified", "last_modified", "created")


@dataclass(frozen=True)
class RawFile:
    """One raw file of a dataset."""

    name: str
    """Base name, unique in its dataset; the partition key."""
    url: str
    size_bytes: int
    stamp: str
    """Changes when the file does: size and modification time, or the store's etag."""


def _raw_file(fs: Any, info: dict[str, Any]) -> RawFile:
    path = info["name"]
    name, size = path.rstrip("/").rsplit("/", 1)[-1], int(info["size"] or 0)
    if isinstance(fs, LocalFileSystem):
        return RawFile(name, path, size, f"{size}-{Path(path).stat().st_mtime_ns}")
    info = fs.info(path)  # a listing may give the same mark in another form
    mark = next((str(info[k]).strip('"') for k in _STAMP_KEYS if info.get(k)), None) or fs.ukey(path)
    return RawFile(name, fs.unstrip_protocol(path), size, f"{size}-{mark}")


def _is_file(info: dict[str, Any]) -> bool:
    return info["type"] == "file" or (bool(info.get("islink")) and Path(info["name"]).is_file())


def _expand(where: str) -> list[RawFile]:
    """Files that match one path, URL or glob, none if there are none."""
    fs, path = file_system(where)
    try:
        with storage_errors(public(where), "can't be listed"):
            fs.invalidate_cache()  # a listing kept by a long process may be old
            # A question mark in a web address begins its query. Only a local path may be looked up by listing.
            wild = "*" if where.startswith(("http://", "https://")) else "*?["
            if not isinstance(fs, LocalFileSystem) and not any(c in path for c in wild):
                found = [fs.info(path)]
            else:
                found = list(fs.glob(path, detail=True).values())
            return [_raw_file(fs, info) for info in found if _is_file(info)]
    except MissingInputError:
        return []


def restat(raw: RawFile) -> RawFile:
    """The raw file as it is now.

    Raises:
        MissingInputError: it is gone.
    """
    fs, path = file_system(raw.url)
    fs.invalidate_cache()
    with storage_errors(f"raw file {public(raw.url)}", "can't be looked up"):
        return _raw_file(fs, fs.info(path))


def discover(dataset: Dataset, home: Home) -> list[RawFile]:
    """The raw files of a dataset, sorted by name.

    Raises:
        MissingInputError: nothing matches; says where it looked and how to set it.
        ConfigError: two files share a base name, or a suffix or protocol can't be read.
    """
    source = dataset.source
    places = [home.resolve(pattern) for pattern in source.files]
    by_name: dict[str, RawFile] = {}
    for place in places:
        for file in _expand(place):
            format_of(file.url)
            other = by_name.setdefault(file.name, file)
            if other.url != file.url:
                raise ConfigError(
                    f"source {source.name!r} has two raw files named {file.name}: {other.url} and {file.url}. "
                    "Base names must be unique in a source; rename one, or make two sources."
                )
    if not by_name:
        raise MissingInputError(_nothing_found(source.name, places, embedded=source.origin == "embedded"))
    return [by_name[name] for name in sorted(by_name)]


def _nothing_found(source: str, places: list[str], *, embedded: bool) -> str:
    looked = "\n".join(f"  {place}" for place in places)
    message = f"source {source!r} has no raw files; looked for:\n{looked}\n"
    if embedded:
        return message + "This corpus is made on this machine by the corpus stage, which `openlm demo` runs first."
    home = "set" if os.environ.get("OPENLM_HOME") else "not set"
    return message + (
        "Put the files there, or name them with the recipe's key sources.files (a path, a glob or an fsspec URL such "
        "as s3://bucket/*.jsonl.zst). A shipped recipe takes them from the environment variable OPENLM_RAW_DATA; "
        f"relative paths start at OPENLM_HOME ({home})."
    )
