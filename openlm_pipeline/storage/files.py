"""Files that are either whole or not there: atomic writes, hashes, locks. Local paths only."""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import secrets
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from filelock import FileLock, Timeout

from openlm_pipeline.errors import BusyError, DataError, MissingInputError, OpenLMError, disk_trouble

TMP_SUFFIX = ".tmp"


@contextlib.contextmanager
def atomic_writer(path: Path, *, shared: bool = False) -> Iterator[BinaryIO]:
    """Open `path` for binary writing under a temporary name; flushed, synced and renamed on success only.

    Args:
        shared: two workers may write it at once, as when one is taken for dead; `remove_leftovers` tidies up.
    """
    make_folder(path.parent)
    tmp = path.with_name(f"{path.name}{'.' + secrets.token_hex(4) if shared else ''}{TMP_SUFFIX}")
    try:
        with naming(path), tmp.open("wb") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        rename(tmp, path)
    except BaseException:
        tmp.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Have errors of an open file, which do not know its name, say it."""
    try:
        yield
    except OSError as e:
        if e.errno and e.filename is None:
            e.filename = str(path)
        raise


def make_folder(folder: Path) -> None:
    """Make a folder and those above it, each synced."""
    if not folder.is_dir():
        make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        sync_folder(folder.parent)


def rename(source: Path, target: Path) -> None:
    """Give a file or folder, of whose content all is synced, its place: whatever dies, it stays there."""
    source.replace(target)
    for folder in {source.parent, target.parent}:
        sync_folder(folder)


def sync_folder(folder: Path) -> None:
    """Have the names in a folder reach the disk, where its file system can be asked to."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with naming(folder):
            os.fsync(descriptor)
    except OSError as e:
        if e.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str, **how: bool) -> None:
    with atomic_writer(path, **how) as f:
        f.write(text.encode())


def write_json(path: Path, value: Any, **how: bool) -> None:
    """Write `value` as indented JSON, keys in the order given, atomically."""
    write_text(path, json.dumps(value, indent=2) + "\n", **how)


def read_json(path: Path) -> Any:
    """Parse a JSON file.

    Raises:
        MissingInputError: there is no such file.
        DataError: it is not JSON.
    """
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise MissingInputError(f"{path} does not exist") from None
    except (ValueError, RecursionError) as e:
        raise DataError(f"{path} is not valid JSON: {e}") from e


def check_inside(names: Iterable[str], described_by: object) -> None:
    """Look whether names of files stay in the folder that they are to be joined to.

    Raises:
        DataError: one leads out of it.
    """
    for name in names:
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise DataError(f"{described_by} names {name!r}, which is outside its folder")


_SEAL = "seal_sha256"
_SUPERSEDED = ".superseded-"


def write_sealed(path: Path, value: dict[str, Any], **how: bool) -> None:
    """`write_json` of an object, with the hash of what it says as its last field."""
    write_json(path, {**value, _SEAL: _seal(value)}, **how)


def read_sealed(path: Path) -> dict[str, Any]:
    """What `write_sealed` wrote, or `write_json` in a release before the seal.

    Raises:
        MissingInputError: there is no such file.
        DataError: it is not a JSON object, or not what was written.
    """
    return unsealed(read_json(path), path)


def unsealed(value: Any, where: object) -> dict[str, Any]:
    """What a file of `write_sealed` holds, without its seal.

    Raises:
        DataError: as `read_sealed`; it names `where`.
    """
    if not isinstance(value, dict):
        raise DataError(f"{where} is not a JSON object")
    seal = value.pop(_SEAL, None)
    if seal is not None and seal != _seal(value):
        raise DataError(f"{where} is damaged: it is not what was written; delete it, and it is made again")
    return value


def _seal(value: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def sha256_file(path: Path) -> str:
    """Hex digest of a file's bytes, read in bounded memory."""
    with path.open("rb") as f:
        return sha256_stream(f)


def sha256_stream(file: BinaryIO) -> str:
    """Hex digest of all that is left to read of an open file, read in bounded memory."""
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


@contextlib.contextmanager
def folder_lock(folder: Path, doing: str) -> Iterator[None]:
    """Hold `folder`/.lock for the length of a `with`; the lock dies with its process.

    Raises:
        BusyError: another process holds it.
        OpenLMError: the folder can't be made.
    """
    lock = FileLock(folder / ".lock")
    try:
        make_folder(folder)
        lock.acquire(timeout=0)
    except Timeout:
        raise BusyError(
            f"another process is already {doing} in {folder}. Wait for it to end, or stop it; "
            "the lock goes away with the process that holds it."
        ) from None
    except OSError as e:
        e.filename = str(folder)
        raise OpenLMError(disk_trouble(e) or f"{folder} can't be made or locked: {e.strerror or e}") from e
    try:
        yield
    finally:
        lock.release()


def is_held(folder: Path) -> bool:
    """Whether a live process holds `folder_lock` of a folder, which is not made for the asking."""
    lock = folder / ".lock"
    try:
        # FileLock would have to write. NFS locks for one alone what is open for writing.
        with lock.open("r+b" if os.access(lock, os.W_OK) else "rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except FileNotFoundError:
        return False
    return False


def set_aside(folder: Path) -> Path:
    """Rename `folder` to `<name>.superseded-N`, so that nothing made before is lost; return the new path."""
    n = 1
    while (target := folder.with_name(f"{folder.name}{_SUPERSEDED}{n}")).exists():
        n += 1
    rename(folder, target)
    return target


def is_set_aside(path: Path) -> bool:
    """Whether it is, or is in, what `set_aside` renamed."""
    return any(_SUPERSEDED in part for part in path.parts)


def remove_leftovers(folder: Path) -> None:
    """Delete what killed writers left in `folder`; for the holder of its lock."""
    for path in folder.rglob(f"*{TMP_SUFFIX}"):
        path.unlink(missing_ok=True)
