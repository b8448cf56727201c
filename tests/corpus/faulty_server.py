"""A real HTTP server whose faults a test chooses request by request, and what it serves."""

import hashlib
import random
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

DATA = random.Random(0).randbytes(1_500_000)
OTHER = random.Random(1).randbytes(1_500_000)
WHOLE = {"a.jsonl", "downloads.json", "SHA256SUMS"}
PART = {"a.jsonl.part", "a.jsonl.part.json"}


@dataclass
class Answer:
    """How to answer one request; the defaults are those of a good server."""

    status: int | None = None
    """Instead of 200, 206 or 416, with no body."""
    headers: dict[str, str | None] = field(default_factory=dict)
    """To add or replace; None leaves one out."""
    ranges: bool = True
    if_range: bool = True
    """Whether If-Range is looked at."""
    cut_after: int | None = None
    """Bytes of body after which the connection is dropped."""
    hold: threading.Event | None = None
    """To wait for after the cut, with the connection open."""
    chunked: bool = False


class FaultyServer:
    """Files by path, a list of next answers by path, and the Range headers seen by path."""

    def __init__(self, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.files: dict[str, bytes] = {}
        self.etags: dict[str, str] = {}
        self.answers: dict[str, list[Answer]] = {}
        self.requests: list[tuple[str, str | None]] = []
        self.sent = threading.Event()
        """Set when an answer was cut."""

    def ranges(self, path: str) -> list[str | None]:
        return [r for p, r in self.requests if p == path]

    def etag(self, path: str) -> str:
        return self.etags.get(path) or f'"{hashlib.sha256(self.files[path]).hexdigest()[:8]}"'


def _handler(server: Callable[[], FaultyServer]) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *arguments: Any) -> None:
            pass

        def do_GET(self) -> None:
            state = server()
            path = self.path.partition("?")[0]
            state.requests.append((path, self.headers.get("Range")))
            queue = state.answers.get(path, [])
            answer = queue.pop(0) if queue else Answer()
            if answer.status or path not in state.files:
                self._send(answer.status or 404, b"", {"Content-Length": "0"}, answer)
                return
            data, etag = state.files[path], state.etag(path)
            headers = {"ETag": etag, "Content-Length": str(len(data)), "Content-Type": "application/octet-stream"}
            asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
            same = not answer.if_range or self.headers.get("If-Range", etag) == etag
            if not (asked and same and answer.ranges):
                self._send(200, data, headers, answer)
            elif int(asked[1]) >= len(data):
                self._send(416, b"", {"Content-Length": "0", "Content-Range": f"bytes */{len(data)}"}, answer)
            else:
                start = int(asked[1])
                headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
                headers["Content-Length"] = str(len(data) - start)
                self._send(206, data[start:], headers, answer)

        def _send(self, status: int, body: bytes, headers: dict[str, Any], answer: Answer) -> None:
            self.send_response(status)
            if answer.chunked:
                headers["Content-Length"], headers["Transfer-Encoding"] = None, "chunked"
                body = b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
            for name, value in {**headers, **answer.headers}.items():
                if value is not None:
                    self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body[: answer.cut_after])
            if answer.cut_after is not None:
                server().sent.set()
                if answer.hold:
                    answer.hold.wait(30)
                self.close_connection = True

    return Handler


@contextmanager
def serve() -> Iterator[FaultyServer]:
    """A server on a free port of this machine until the `with` ends."""
    with ThreadingHTTPServer(("127.0.0.1", 0), _handler(lambda: state)) as httpd:
        httpd.daemon_threads = True
        state = FaultyServer(httpd.server_port)
        thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        yield state
        httpd.shutdown()
        thread.join()


def names(folder: Path) -> set[str]:
    """All files of a folder but its lock."""
    return {path.name for path in folder.iterdir()} - {".lock"}


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
