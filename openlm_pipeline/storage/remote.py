"""Files on remote storage, through fsspec: read, fetched and sent whole, or not at all with an error that says why.

Any URL that fsspec speaks will do (`s3://`, `http(s)://`, `hf://`, ...); credentials and endpoints come from where
its library looks for them, such as `AWS_ENDPOINT_URL`. What a message says of a URL leaves out its secrets.
"""

import asyncio
import contextlib
import hashlib
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import fsspec
from fsspec.implementations.local import LocalFileSystem

from openlm_pipeline.errors import ConfigError, DataError, MissingInputError, OpenLMError, public
from openlm_pipeline.storage.files import TMP_SUFFIX, atomic_writer, sha256_stream
from openlm_pipeline.waits import waiting_for

_ATTEMPTS = 3
_BLOCK_BYTES = 1 << 20
_RANGE_BYTES = 16 << 20
"""Asked of a store at once when a file is read; its readers keep up to two of these in memory."""
_PART_BYTES = 16 << 20
"""A file of twice this and more goes to S3 in parts of this size, a few at once and held in memory."""
_PARTS_AT_ONCE = 4
_HTTP = ("http", "https")
_GONE = (404, 410)
_WHOLE_PUTS = ("s3", "gs", "gcs", "abfs", "abfss", "az", "adl", "memory")
"""Stores in which an object shows only when all of it is there."""
_CONNECT_SECONDS, _SILENCE_SECONDS = 30, 60


def is_remote(url: str) -> bool:
    """Whether this is a URL and no local path."""
    return "://" in url and not url.startswith(("file://", "local://"))


def join(folder: str, name: str) -> str:
    return f"{folder.rstrip('/')}/{name}"


def _protocols(fs: Any) -> tuple[str, ...]:
    return (fs.protocol,) if isinstance(fs.protocol, str) else tuple(fs.protocol)


def _has(fs: Any, protocols: tuple[str, ...]) -> bool:
    return bool(set(_protocols(fs)) & set(protocols))


def file_system(url: str) -> tuple[Any, str]:
    """The fsspec file system of a local path or URL, and the path in it.

    Raises:
        ConfigError: no installed library speaks the URL's protocol, and what to install; or a password is in the URL.
    """
    protocol, _, rest = url.partition("://")
    if ":" in rest.split("/", 1)[0].rpartition("@")[0]:
        raise ConfigError(
            f"{public(url)} has a password in it, which would be shown and stored with the URL; give it in the "
            "environment, as the library for the protocol takes it"
        )
    options: dict[str, Any] = {}
    try:
        if protocol in _HTTP and "client_kwargs" not in fsspec.config.conf.get(protocol, {}):
            import aiohttp  # slow to import, and most paths need none

            # The default ends every request after five minutes, however well it goes.
            timeout = aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_SECONDS, sock_read=_SILENCE_SECONDS)
            options = {"client_kwargs": {"timeout": timeout}}
        if protocol in ("s3", "s3a"):
            _retry_altered_answers()
            options = {"use_listings_cache": False}  # it would hide what others put there since
        return fsspec.core.url_to_fs(url, **options)
    except ImportError as e:
        hint = "pip install 'openlm-pipeline[s3]'" if protocol in ("s3", "s3a") else str(e)
        raise ConfigError(
            f"{public(url)} can't be opened, because a library for {protocol}:// is missing: {hint}"
        ) from e
    except ValueError as e:
        raise ConfigError(f"{public(url)} can't be opened: {public(str(e))}") from None


def _retry_altered_answers() -> None:
    """Have s3fs ask again for an answer whose checksum is wrong, as it does for one that is cut."""
    from botocore.exceptions import FlexibleChecksumError
    from s3fs import core

    if FlexibleChecksumError not in core.S3_RETRYABLE_ERRORS:
        core.add_retryable_error(FlexibleChecksumError)


def _reason(error: BaseException) -> str:
    kind = type(error).__name__
    text = "timed out" if isinstance(error, (TimeoutError, asyncio.TimeoutError)) else public(str(error))
    return text if isinstance(error, OSError) and text else f"{kind}: {text}" if text else kind


def _cause(error: BaseException) -> BaseException | None:
    """The error as the cause of another, if its text gives no secret away."""
    return error if public(str(error)) == str(error) else None


@contextlib.contextmanager
def storage_errors(file: str, deed: str) -> Iterator[None]:
    """Turn whatever a storage library raises into an error of ours: `file` names it, `deed` is as "can't be read".

    Raises:
        MissingInputError: there is no such file.
        ConfigError: access is denied, or credentials are missing.
        DataError: anything else.
    """
    try:
        with waiting_for(f"the storage of {file}", "storage"):
            yield
    except OpenLMError:
        raise
    except Exception as e:  # noqa: BLE001 - the errors of storage libraries have no base in common
        # fsspec calls a file of an HTTP server missing whenever the server does not describe it.
        unclear = type(e.__cause__).__module__.startswith("aiohttp") and getattr(e.__cause__, "status", 0) not in _GONE
        error = e.__cause__ if e.__cause__ is not None and unclear else e
        if isinstance(error, FileNotFoundError):
            raise MissingInputError(f"{file} does not exist") from _cause(error)
        if isinstance(error, PermissionError) or type(error).__name__.endswith("CredentialsError"):
            denied = f"{file} {deed}: {_reason(error)}. Check the address and the credentials."
            raise ConfigError(denied) from _cause(error)
        raise DataError(f"{file} {deed}: {_reason(error)}") from _cause(error)


class _Checked(io.RawIOBase):
    """A remote file that ends where its size says; any failure is an OSError, as of a local file."""

    def __init__(self, file: Any, size: int | None) -> None:
        self._file, self._size = file, size

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._file.tell()

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        try:
            return self._file.seek(offset, whence)
        except ValueError as e:
            raise OSError(str(e)) from e

    def readinto(self, buffer: Any) -> int:
        position = self._file.tell()
        try:
            data = self._file.read(len(buffer))
        except Exception as e:  # noqa: BLE001 - as in `storage_errors`
            if isinstance(e, OSError) and str(e) and _cause(e):
                raise
            if isinstance(e, ValueError) and "range requests" in str(e):
                raise OSError("its server sends whole files only; fetch it with `openlm download` first") from None
            raise OSError(_reason(e)) from _cause(e)
        if not data and len(buffer) and self._size is not None and position < self._size:
            raise OSError(f"it ends at byte {position}, but its size is {self._size}")
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()


def _open(fs: Any, path: str, *, sequential: bool) -> BinaryIO:
    if isinstance(fs, LocalFileSystem):
        return Path(path).open("rb")
    # By ranges, so that the library can ask again for one; HTTP servers need not have any.
    file = fs.open(path, "rb", block_size=0 if sequential and _has(fs, _HTTP) else _RANGE_BYTES)
    size = file.size if file.size is not None else fs.info(path).get("size")
    return io.BufferedReader(_Checked(file, size), _BLOCK_BYTES)


def open_remote(url: str, what: str = "file") -> BinaryIO:
    """Open a local path or URL for reading bytes, with seeking; errors call it `what`.

    A read that fails, or that ends before the file's size, raises OSError: never a short read taken for the end.

    Raises:
        MissingInputError, ConfigError, DataError: it can't be opened.
    """
    fs, path = file_system(url)
    with storage_errors(f"{what} {public(url)}", "can't be opened"):
        return _open(fs, path, sequential=False)


def remote_size(url: str) -> int | None:
    """Bytes of a file; None if its store does not say.

    Raises:
        MissingInputError, ConfigError, DataError: it can't be looked up.
    """
    fs, path = file_system(url)
    with storage_errors(public(url), "can't be looked up"):
        fs.invalidate_cache(fs._parent(path))
        return fs.info(path).get("size")


def exists(url: str) -> bool:
    """Whether there is a file or folder.

    Raises:
        ConfigError, DataError: it can't be looked up.
    """
    fs, path = file_system(url)
    with storage_errors(public(url), "can't be looked up"):
        fs.invalidate_cache()
        return fs.exists(path)


def names_in(folder: str) -> list[str]:
    """Names of the files and folders in a folder, sorted; none where it does not exist.

    Raises:
        ConfigError, DataError: it can't be listed.
    """
    fs, path = file_system(folder)
    with storage_errors(public(folder), "can't be listed"):
        fs.invalidate_cache()
        found = fs.ls(path, detail=False) if fs.exists(path) else []
    return sorted(name.rstrip("/").rsplit("/", 1)[-1] for name in found)


def remove(url: str) -> None:
    """Remove a file, or a folder with all that is in it; nothing where there is none.

    Raises:
        ConfigError, DataError: it can't be removed.
    """
    fs, path = file_system(url)
    with storage_errors(public(url), "can't be removed"):
        fs.invalidate_cache()
        if fs.exists(path):
            fs.rm(path, recursive=True)


def read_json_at(url: str) -> Any:
    """The content of a JSON file; None if it is missing.

    Raises:
        ConfigError, DataError: it can't be read, or is not JSON.
    """
    try:
        with open_remote(url) as f, storage_errors(public(url), "can't be read"):
            return json.loads(f.read())
    except MissingInputError:
        return None


class _NotWhole(DataError):
    """What came is not what was to come; it may come whole next time."""


def download(url: str, path: Path, *, size: int | None = None, sha256: str | None = None) -> None:
    """Fetch a file to `path`, where it shows only when it is whole: it has the size and hash given, or its own size.

    One process at a time may fetch to a path.

    Raises:
        MissingInputError: there is no such file.
        ConfigError: it may not be read, or its protocol is unknown.
        DataError: it stays unreadable, short or altered; names the URL and the bytes.
    """
    fs, where = file_system(url)
    # fsspec's HTTP client alone asks only once.
    again = DataError if _has(fs, _HTTP) else _NotWhole
    for attempt in range(1, _ATTEMPTS + 1):
        try:
            with atomic_writer(path) as out, storage_errors(public(url), "can't be fetched"):
                _copy(fs, where, url, out, size, sha256)
            return
        except again:
            if attempt == _ATTEMPTS:
                raise


def _copy(fs: Any, where: str, url: str, out: BinaryIO, size: int | None, sha256: str | None) -> None:
    digest = hashlib.sha256()
    got = 0
    with _open(fs, where, sequential=True) as file:
        while block := file.read(_BLOCK_BYTES):
            got += len(block)
            digest.update(block)
            out.write(block)
    if size is not None and got != size:
        raise _NotWhole(f"{public(url)} has {got} bytes, but {size} are expected: it was cut, or replaced by another")
    if sha256 is not None and digest.hexdigest() != sha256:
        raise _NotWhole(
            f"{public(url)} has sha256 {digest.hexdigest()}, but {sha256} is expected ({got} bytes): it is damaged, or "
            "replaced by another"
        )


def holds(url: str, *, size: int, sha256: str) -> bool:
    """Whether the store has a file of this content at `url`.

    On S3 its size and the hash that `upload` noted with it say so; elsewhere it is read.

    Raises:
        ConfigError, DataError: the store can't be asked.
    """
    fs, where = file_system(url)
    try:
        if remote_size(url) != size:
            return False
        with storage_errors(public(url), "can't be looked up"):
            if _has(fs, ("s3",)):
                return _head(fs, where).get("Metadata", {}).get("sha256") == sha256
            with _open(fs, where, sequential=True) as file:
                return sha256_stream(file) == sha256
    except MissingInputError:
        return False


def upload(path: Path, url: str) -> None:
    """Send a file to `url`, where it shows only when it is whole, and check what the store then has.

    Raises:
        ConfigError: it may not be written, or its protocol is unknown or read-only.
        DataError: it could not be sent, or arrived altered; then it is not left there.
    """
    fs, where = file_system(url)
    if _has(fs, _HTTP):
        raise ConfigError(f"{public(url)} can't be written: HTTP servers are for reading; use s3:// or another store")
    with path.open("rb") as file:
        sha256 = sha256_stream(file)
        size = file.tell()
    whole_puts = _has(fs, _WHOLE_PUTS)
    target = where if whole_puts else where + TMP_SUFFIX
    deed = f"can't be uploaded to {public(url)}"
    with storage_errors(str(path), deed):
        if _has(fs, ("s3",)):
            noted = {"sha256": sha256}
            fs.put_file(str(path), target, chunksize=_PART_BYTES, max_concurrency=_PARTS_AT_ONCE, Metadata=noted)
            intact = _arrived_on_s3(fs, target, path, size)
        else:
            fs.makedirs(fs._parent(target), exist_ok=True)
            fs.put_file(str(path), target)
            with _open(fs, target, sequential=True) as file:
                intact = sha256_stream(file) == sha256
        if not intact:
            fs.rm_file(target)
            raise DataError(f"{path} {deed}: it arrived altered, and was removed there. Try again.")
        if target != where:
            fs.mv(target, where)


def _head(fs: Any, where: str) -> dict[str, Any]:
    bucket, key, _ = fs.split_path(where)
    return fs.call_s3("head_object", Bucket=bucket, Key=key)


def _arrived_on_s3(fs: Any, where: str, path: Path, size: int) -> bool:
    """Whether an object is the file `path` that was put there just now, as far as its ETag can tell."""
    head = _head(fs, where)
    if head["ContentLength"] != size:
        return False
    if head.get("ServerSideEncryption", "").startswith("aws:kms") or "SSECustomerAlgorithm" in head:
        return True  # their ETags are no hashes; S3 itself checked the checksum that botocore sends along
    whole, parts = hashlib.md5(usedforsecurity=False), []
    with path.open("rb") as file:
        while part := file.read(_PART_BYTES):
            whole.update(part)
            parts.append(hashlib.md5(part, usedforsecurity=False).digest())
    if size < 2 * _PART_BYTES:  # as s3fs decides it
        etag = whole.hexdigest()
    else:
        etag = f"{hashlib.md5(b''.join(parts), usedforsecurity=False).hexdigest()}-{len(parts)}"
    return head["ETag"].strip('"') == etag


def sha256_url(url: str) -> str:
    """Hex digest of the bytes at `url`, read in bounded memory."""
    with open_remote(url, "raw file") as f:
        return sha256_stream(f)
