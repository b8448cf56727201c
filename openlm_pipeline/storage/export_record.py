"""`export.json` of a folder that an export made: from what, and the sha256 of its files, sealed and written last."""

import os
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from openlm_pipeline.errors import DataError, MissingInputError
from openlm_pipeline.storage.files import read_sealed, sha256_file, write_sealed

EXPORT = "export.json"
_FILES = "files"


def write_record(folder: Path, about: Mapping[str, Any], paths: Iterable[Path] = ()) -> None:
    """Write it.

    Args:
        paths: of files in the folder, which other libraries may have left unsynced.
    """

    def synced(path: Path) -> tuple[str, str]:
        with path.open("rb") as f:
            os.fsync(f.fileno())
        return path.relative_to(folder).as_posix(), sha256_file(path)

    with ThreadPoolExecutor() as pool:  # hashing gives the interpreter's lock back
        files = dict(pool.map(synced, sorted(paths)))
    write_sealed(folder / EXPORT, {**about, **({_FILES: files} if files else {})})


def read_record(folder: Path) -> dict[str, Any]:
    """What the export was made from, without the hashes of its files.

    Raises:
        MissingInputError, DataError: it is not there, or damaged.
    """
    return {name: value for name, value in read_sealed(folder / EXPORT).items() if name != _FILES}


def recorded_files(folder: Path) -> dict[str, str]:
    """The sha256 of files of a folder, by name; empty where no export is recorded.

    Raises:
        DataError: the record is damaged.
    """
    return read_sealed(folder / EXPORT).get(_FILES, {}) if (folder / EXPORT).exists() else {}


def check_file(path: Path, recorded: str | None, sha256: Callable[[Path], str] = sha256_file) -> None:
    """Compare a file with its hash of `recorded_files`; nothing without one.

    Raises:
        DataError: it is damaged, or another.
        MissingInputError: it is not there.
    """
    if recorded is None:
        return
    if not path.exists():
        raise MissingInputError(f"{path}, which {EXPORT} names, does not exist; the same export makes it again")
    if sha256(path) != recorded:
        raise DataError(
            f"{path} is not what {EXPORT} says: it is damaged, and once deleted the same export makes it again; if it "
            f"was changed on purpose, delete {EXPORT}"
        )
