"""The Dagster UI in a real browser: a server of its own, its pages, and the graph."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from playwright.sync_api import Page, sync_playwright

CHROMIUM = "/usr/bin/chromium"
_QUIET = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
START_SECONDS = 240.0
PAGE_SECONDS = 300.0


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@contextlib.contextmanager
def webserver(
    source: list[str], cwd: Path, variables: dict[str, str], log: Path, *, daemon: bool = False
) -> Iterator[str]:
    """A running `dagster-webserver`; yields its address.

    Args:
        source: where the definitions are: `["-m", module]` or `["-f", file]`.
        daemon: run `dagster dev` instead, which has the daemon too that backfills and automation need.
    """
    port = _free_port()
    programs = Path(sys.executable).parent
    command = [str(programs / "dagster"), "dev"] if daemon else [str(programs / "dagster-webserver")]
    command += [*source, "-h", "127.0.0.1", "-p", str(port)]
    address = f"http://127.0.0.1:{port}"
    with log.open("w") as output:
        server = subprocess.Popen(
            command, cwd=cwd, env=variables, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            deadline = time.monotonic() + START_SECONDS
            while True:
                with contextlib.suppress(urllib.error.URLError):
                    urllib.request.urlopen(f"{address}/server_info", timeout=5).close()
                    break
                assert server.poll() is None and time.monotonic() < deadline, log.read_text()
                time.sleep(0.1)
            yield address
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(server.pid, signal.SIGTERM)
            try:
                server.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(server.pid, signal.SIGKILL)
                server.wait()


@contextlib.contextmanager
def browser_page(width: int = 1600, height: int = 1000, scale: float = 1.0) -> Iterator[Page]:
    """A page in a headless Chromium."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=list(_QUIET))
        page = browser.new_page(viewport={"width": width, "height": height}, device_scale_factor=scale)
        page.set_default_timeout(PAGE_SECONDS * 1000)
        try:
            yield page
        finally:
            browser.close()


def open_graph(page: Page, address: str) -> None:
    """The global asset graph with every group expanded."""
    page.goto(f"{address}/asset-groups")
    page.get_by_role("button", name="Materialize all").wait_for()
    page.locator("svg foreignObject").first.wait_for()
    page.keyboard.press("Alt+e")
    page.wait_for_url("**/asset-groups?*expanded=*")


def graph_texts(page: Page) -> list[str]:
    """The text of each group and asset drawn on the graph."""
    return [text for text in page.locator("svg foreignObject").all_text_contents() if text]
