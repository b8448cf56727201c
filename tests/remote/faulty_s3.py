"""A store that speaks S3 and HTTP, behind a proxy that does to chosen requests what networks do."""

import http.client
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import fsspec

CUT = "the body ends early and the connection closes"
SHORT = "the body is shorter, and the headers say so too"
FLIP = "one bit of the answer's body is flipped"
STALL = "half of the body, then silence"
DROP = "half of the request's body is read, then the connection closes"
FLIP_SENT = "one bit of the request's body is flipped"
ERRORS = {"500": 500, "503": 503, "403": 403}

_HOP_BY_HOP = {"connection", "transfer-encoding", "content-length", "keep-alive", "date", "server"}


@dataclass
class Faults:
    """What happens to requests: each fault meets those of a method and path, a number of times."""

    fault: str | None = None
    method: str = "GET"
    path_end: str = ""
    times: int = 0
    met: int = 0
    """Requests that met the fault."""
    requests: list[tuple[str, str]] = field(default_factory=list)
    """(method, path) of all requests."""
    released: threading.Event = field(default_factory=threading.Event)
    """Ends the silence of stalled connections."""
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def reset(self) -> None:
        self.times = 0
        self.requests.clear()

    def set(self, fault: str, times: int = 1, *, method: str = "GET", path_end: str = "") -> None:
        self.fault, self.times, self.method, self.path_end, self.met = fault, times, method, path_end, 0

    def take(self, method: str, path: str) -> str | None:
        """The fault of this request."""
        with self._lock:
            self.requests.append((method, path.split("?")[0]))
            if self.met < self.times and method == self.method and path.split("?")[0].endswith(self.path_end):
                self.met += 1
                return self.fault
        return None

    def count(self, method: str, path_end: str) -> int:
        return sum(m == method and p.endswith(path_end) for m, p in self.requests)


def _flipped(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


def _handler(upstream: int, faults: Faults) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: object) -> None:
            pass

        def _forward(self) -> None:
            fault = faults.take(self.command, self.path)
            length = int(self.headers.get("Content-Length") or 0)
            if fault == DROP:
                self.rfile.read(length // 2)
                self.close_connection = True
                return
            body = self.rfile.read(length)
            if fault == FLIP_SENT:
                body = _flipped(body)
            if fault in ERRORS:
                self._answer(ERRORS[fault], [("Content-Type", "text/plain")], b"it went wrong")
                return
            server = http.client.HTTPConnection("127.0.0.1", upstream, timeout=20)
            try:
                headers = {k: v for k, v in self.headers.items() if k.lower() not in ("connection", "content-length")}
                server.request(self.command, self.path, body, headers)
                answer = server.getresponse()
                data = answer.read()
            finally:
                server.close()
            kept = [(k, v) for k, v in answer.getheaders() if k.lower() not in _HOP_BY_HOP]
            if self.command == "HEAD":
                self._answer(answer.status, [*kept, ("Content-Length", answer.headers["Content-Length"] or "0")], None)
                return
            if fault == FLIP:
                data = _flipped(data)
            if fault == SHORT:
                data = data[: len(data) // 2]
            self._answer(answer.status, kept, data, cut=fault in (CUT, STALL))
            if fault == STALL:
                faults.released.wait(20)

        def _answer(self, status: int, headers: list[tuple[str, str]], body: bytes | None, cut: bool = False) -> None:
            self.send_response(status)
            for name, value in headers:
                self.send_header(name, value)
            if body is not None:
                self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write((body or b"")[: len(body or b"") // 2 if cut else None])
            self.wfile.flush()
            self.close_connection = cut or self.close_connection

        do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _forward

    return Handler


@contextmanager
def proxy(upstream: int) -> Iterator[tuple[int, Faults]]:
    """The port of a proxy before the server at `upstream`, and what goes wrong there."""
    faults = Faults()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(upstream, faults))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield server.server_address[1], faults
    finally:
        faults.released.set()
        server.shutdown()
        server.server_close()


@dataclass(frozen=True)
class Bucket:
    """An empty bucket."""

    url: str
    """As S3, through the faulty proxy, which the environment names as the endpoint."""
    http_url: str
    """The same files over plain HTTP, through the same proxy."""
    faults: Faults
    direct: fsspec.AbstractFileSystem
    """The store itself, without the proxy."""
    name: str

    def put(self, name: str, data: bytes) -> None:
        self.direct.pipe_file(f"{self.name}/{name}", data)

    def read(self, name: str) -> bytes:
        self.direct.invalidate_cache()
        return self.direct.cat_file(f"{self.name}/{name}")

    def names(self) -> set[str]:
        self.direct.invalidate_cache()
        return {path.removeprefix(f"{self.name}/") for path in self.direct.find(self.name)}
