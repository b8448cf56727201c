"""Opening a remote file at an offset, so that what was fetched before is continued only if it is of the same version.

`http(s)://` goes through requests: fsspec's HTTP needs aiohttp and can't send If-Range, while requests gives the plain
headers, raw bodies checked against Content-Length, proxies and ~/.netrc. Other protocols go through fsspec.
"""

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import requests
import urllib3

from openlm_pipeline.errors import ConfigError, DataError, MissingInputError, OpenLMError
from openlm_pipeline.storage.remote import file_system, storage_errors
from openlm_pipeline.strict import Strict

CONNECT_TIMEOUT_SECONDS = 10.0
_HTTP_CHUNK_BYTES = 1 << 17
# One range request per chunk, because object stores are read without read-ahead.
_STORE_CHUNK_BYTES = 8 << 20
_CONTENT_RANGE = re.compile(r"bytes (\d+)-\d+/(\d+)")
_COMPRESSED = (".gz", ".tgz", ".zst", ".br")
_HEALS = {408, 425, 429, 500, 502, 503, 504}


class TransferError(OpenLMError):
    """A transfer failed in a way that trying again may heal."""

    def __init__(self, message: str, retry_after_seconds: float = 0.0) -> None:
        super().__init__(message)
        self.retry_after_seconds = retry_after_seconds


class RemoteFile(Strict):
    """One version of a remote file, as its server describes it, or `downloads.json` once it is whole here."""

    source: str
    """The URL without query, which may hold a secret."""
    size_bytes: int | None
    sha256: str | None = None
    """Of a file that is whole here, and where the store knows it."""
    etag: str | None = None
    last_modified: str | None = None

    @property
    def validator(self) -> str | None:
        """What If-Range may hold (RFC 9110, 13.1.5): a strong ETag, else the modification time."""
        if self.etag and not self.etag.startswith("W/"):
            return self.etag
        return self.last_modified


@dataclass(frozen=True)
class Opened:
    """An open transfer."""

    remote: RemoteFile
    offset: int
    """Where the chunks begin: as asked for, or 0 if that version can't be continued."""
    chunks: Iterator[bytes]


def public_url(url: str) -> str:
    """The URL without query and fragment, which may hold secrets; only web addresses have them."""
    return urlsplit(url)._replace(query="", fragment="").geturl() if is_http(url) else url


def is_http(url: str) -> bool:
    return url.lower().startswith(("http://", "https://"))


def open_source(
    url: str, *, known: RemoteFile | None = None, offset: int = 0, timeout_seconds: float = 30.0
) -> contextlib.AbstractContextManager[Opened]:
    """Open `url` at byte `offset` of the version `known`, or at 0 if the file is another by now.

    The chunks end only where the server says that the file ends.

    Raises:
        MissingInputError: it is not there, or may not be read.
        ConfigError: the address is not valid, or no installed library speaks its protocol.
        DataError: the server sends a web page instead.
        TransferError: anything that may heal; raised by the chunks too.
    """
    return _open_http(url, known, offset, timeout_seconds) if is_http(url) else _open_store(url, known, offset)


def _root(error: BaseException) -> BaseException:
    """The first cause: it says what happened, and unlike its wrappers it doesn't quote the URL's query."""
    while inner := error.__cause__ or error.__context__:
        error = inner
    return error


def _request(session: requests.Session, url: str, headers: dict[str, str], timeout_seconds: float) -> requests.Response:
    source = public_url(url)
    headers = {"Accept-Encoding": "identity", **headers}
    try:
        return session.get(url, headers=headers, stream=True, timeout=(CONNECT_TIMEOUT_SECONDS, timeout_seconds))
    except requests.exceptions.SSLError as e:
        raise MissingInputError(f"{source}: no safe connection: {_root(e)}") from None
    except (requests.ConnectionError, requests.Timeout) as e:
        unknown_host = isinstance(getattr(e.args[0], "reason", None), urllib3.exceptions.NameResolutionError)
        what = f"host {urlsplit(url).hostname} can't be found" if unknown_host else "no answer"
        raise TransferError(f"{source}: {what}: {_root(e)}") from None
    except (requests.exceptions.InvalidURL, requests.exceptions.InvalidSchema, UnicodeError):
        raise ConfigError(f"{source} is not a valid web address") from None
    except requests.RequestException as e:
        raise MissingInputError(f"{source} can't be fetched ({type(e).__name__})") from None


def _refuse(response: requests.Response, source: str) -> OpenLMError:
    answer = f"{source}: the server answers {response.status_code} {response.reason}"
    if response.status_code in _HEALS:
        wait = response.headers.get("Retry-After", "")
        return TransferError(answer, float(wait) if wait.isdecimal() else 0.0)
    advice = {
        401: "Access needs credentials: put them into ~/.netrc, or for hf:// set HF_TOKEN.",
        403: "Access is refused: check your rights, or whether the link has expired.",
        404: "Check the address, and the range in its braces.",
        410: "The file was removed; look for another mirror.",
    }
    return MissingInputError(f"{answer}. {advice.get(response.status_code, 'Check the address.')}")


def _continues(response: requests.Response, known: RemoteFile, offset: int) -> bool:
    """Whether a 206 holds the rest of that same version; some servers honour Range but not If-Range."""
    span = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
    return (
        response.status_code == 206
        and span is not None
        and (int(span[1]), int(span[2])) == (offset, known.size_bytes)
        and response.headers.get("ETag", known.etag) == known.etag
        and response.headers.get("Last-Modified", known.last_modified) == known.last_modified
    )


def _described(response: requests.Response, source: str) -> RemoteFile:
    headers = response.headers
    if headers.get("Content-Type", "").startswith("text/html") and not source.endswith((".html", ".htm", "/")):
        raise DataError(f"{source}: the server sends a web page instead of the file. Open the address in a browser.")
    if (encoding := headers.get("Content-Encoding", "identity")) != "identity" and not source.endswith(_COMPRESSED):
        raise DataError(f"{source}: the server insists on sending it as {encoding}. Use another mirror.")
    size = headers.get("Content-Length", "")
    if not size.isdecimal() and headers.get("Transfer-Encoding", "").lower() != "chunked":
        raise DataError(
            f"{source}: the server doesn't say how long the file is, so a whole one can't be told from a cut one. "
            "Use another mirror."
        )
    return RemoteFile(
        source=source,
        size_bytes=int(size) if size.isdecimal() else None,
        etag=headers.get("ETag"),
        last_modified=headers.get("Last-Modified"),
    )


def _http_chunks(response: requests.Response, source: str) -> Iterator[bytes]:
    try:
        # Undecoded: a file stored compressed must stay so, whatever Content-Encoding says.
        yield from response.raw.stream(_HTTP_CHUNK_BYTES, decode_content=False)
    except (urllib3.exceptions.HTTPError, OSError) as e:
        raise TransferError(f"{source}: the connection broke: {_root(e)}") from None


@contextlib.contextmanager
def _open_http(url: str, known: RemoteFile | None, offset: int, timeout_seconds: float) -> Iterator[Opened]:
    source = public_url(url)
    asks: list[dict[str, str]] = [{}]
    if known and offset and known.size_bytes is not None and known.validator:
        asks.insert(0, {"Range": f"bytes={offset}-", "If-Range": known.validator})
    with contextlib.ExitStack() as stack:
        session = stack.enter_context(requests.Session())
        for headers in asks:
            response = stack.enter_context(_request(session, url, headers, timeout_seconds))
            if known and headers and _continues(response, known, offset):
                yield Opened(known, offset, _http_chunks(response, source))
                return
            if response.status_code not in (206, 416):  # these two say that the rest can't be had
                break
        if response.status_code != 200:
            raise _refuse(response, source)
        yield Opened(_described(response, source), 0, _http_chunks(response, source))


@contextlib.contextmanager
def _store_errors(url: str) -> Iterator[None]:
    try:
        with storage_errors(url, "can't be fetched"):
            yield
    except DataError as e:  # what has no other name may heal
        raise TransferError(str(e)) from e


def _store_version(fs: Any, path: str, url: str) -> RemoteFile:
    fs.invalidate_cache()
    info = fs.info(path)
    if info["type"] != "file" or info["size"] is None:
        raise MissingInputError(f"{url} is not a file. Check the address.")
    mark = info.get("ETag") or info.get("blob_id") or fs.ukey(path)
    sha256 = getattr(info.get("lfs"), "sha256", None)  # on the Hugging Face hub
    return RemoteFile(source=url, size_bytes=info["size"], etag=str(mark), sha256=sha256)


@contextlib.contextmanager
def _open_store(url: str, known: RemoteFile | None, offset: int) -> Iterator[Opened]:
    with _store_errors(url):
        fs, path = file_system(url)
        remote = _store_version(fs, path, url)
        start = offset if remote == known else 0
        file = fs.open(path, "rb", cache_type="none")
        file.seek(start)

    def chunks() -> Iterator[bytes]:
        with _store_errors(url):
            while chunk := file.read(_STORE_CHUNK_BYTES):
                yield chunk
            if _store_version(fs, path, url) != remote:
                raise TransferError(f"{url} changed while it was read")

    with file:
        yield Opened(remote, start, chunks())
