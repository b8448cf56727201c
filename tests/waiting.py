"""Waiting for another process."""

import time
from collections.abc import Callable
from typing import Any


def wait_until(condition: Callable[[], bool], process: Any | None = None, seconds: float = 600) -> None:
    """Poll until `condition()`; fails when the time is up or `process` ended before."""
    end = time.monotonic() + seconds
    while not condition():
        assert process is None or process.poll() is None, "the process ended before what was waited for"
        assert time.monotonic() < end, "what was waited for did not come"
        time.sleep(0.05)
