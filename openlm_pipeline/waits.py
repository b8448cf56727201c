"""A wait that gets long says what for."""

import contextlib
import logging
import threading
import time
from collections.abc import Iterator

PATIENCE_SECONDS = 5.0
"""How long a wait may take without a word."""
_AGAIN_SECONDS = 60.0
_log = logging.getLogger(__name__)
_said: dict[str, float] = {}


@contextlib.contextmanager
def waiting_for(what: str, kind: str = "") -> Iterator[None]:
    """Log a warning, which goes to the terminal, should the `with` take longer than `PATIENCE_SECONDS`.

    Args:
        kind: of waits that may be many, of which one a minute is told; by default what is waited for.
    """
    timer = threading.Timer(PATIENCE_SECONDS, _say, [what, kind or what])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _say(what: str, kind: str) -> None:
    now = time.monotonic()
    if now - _said.get(kind, -_AGAIN_SECONDS) >= _AGAIN_SECONDS:
        _said[kind] = now
        _log.warning("waiting for %s", what)
