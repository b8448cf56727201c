"""`openlm download`: raw files from URL templates; progress bars on a terminal, plain lines elsewhere."""

import contextlib
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

if TYPE_CHECKING:
    from openlm_pipeline.corpus.download import DownloadProgress

_PLAIN_PERIOD_SECONDS = 30.0


def download(
    urls: Annotated[
        list[str],
        typer.Argument(
            metavar="URL_TEMPLATE...",
            help="URLs; {00..29} and {val,test} stand for several, * in a store's URL for what is there. @FILE or @URL "
            "lists such. Quote them.",
        ),
    ],
    output_dir: Annotated[Path, typer.Option("--output-dir", "-o", help="Folder of the files; made if need be.")],
    checksums: Annotated[
        str | None, typer.Option(help="Path or URL of a file as sha256sum or md5sum writes it, with all the files.")
    ] = None,
    parallel: Annotated[int, typer.Option("--parallel", "-j", min=1, help="Files at a time.")] = 4,
    retries: Annotated[int, typer.Option(min=0, help="Attempts in a row without a new byte, after the first.")] = 5,
    timeout: Annotated[float, typer.Option(min=1, help="Longest silence of a server, in seconds.")] = 30.0,
    verify: Annotated[bool, typer.Option("--verify", help="Read what is there; fetch damaged files again.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only list the files and what of them is there.")] = False,
) -> None:
    """Fetch lists of raw files over http(s)://, s3://, hf:// and all else that fsspec reads.

    A file is named by its path below the folders that its template names, and gets its name only when it is whole and
    checked. After any interruption the same command resumes where it stopped; a file that changed meanwhile begins
    anew. SHA256SUMS in the folder holds the hash of every file, so that `sha256sum -c SHA256SUMS` checks them.

    Credentials come from ~/.netrc, or from what s3fs and huggingface_hub read in the environment. Licences of the data
    are yours to check.

    Example: openlm download 'https://host/pile/train/{00..29}.jsonl.zst' 'https://host/pile/{val,test}.jsonl.zst'
    --output-dir raw/pile --checksums https://host/pile/SHA256SUMS.txt
    """
    from openlm_pipeline.corpus.download import download_files, expand_templates
    from openlm_pipeline.corpus.download_folder import local_state

    console = Console(highlight=False, soft_wrap=True)

    def say(line: str) -> None:
        console.print(line, markup=False)

    targets = expand_templates(urls, output_dir)
    states = {target.name: local_state(output_dir, target.name) for target in targets}
    if dry_run:
        for target in targets:
            state, size = states[target.name]
            say(f"{target.name}  {state}{f', {size:,} bytes' if size else ''}  {target.source}")
        return
    missing = sum(state != "there" for state, _ in states.values())
    say(f"{missing} of {len(targets)} files to fetch into {output_dir}")
    with (_bars if console.is_terminal else _lines)(console, missing) as progress:
        download_files(
            urls,
            output_dir,
            checksums=checksums,
            parallel=parallel,
            retries=retries,
            timeout_seconds=timeout,
            verify=verify,
            report=say,
            progress=progress,
        )
    say(f"all {len(targets)} files are whole in {output_dir}")


class _Totals:
    """Sums over files; the size of files not begun is guessed from that of the others."""

    def __init__(self, num_files: int) -> None:
        self._num_files = num_files
        self._lock = threading.Lock()
        self._first: dict[str, int] = {}
        self._done: dict[str, int] = {}
        self._size: dict[str, int] = {}

    def update(self, name: str, done: int, size: int | None) -> tuple[int, int, float | None]:
        """Bytes there, bytes fetched by this process, and about how many there will be in all."""
        with self._lock:
            self._first.setdefault(name, done)
            self._done[name] = done
            if size is not None:
                self._size[name] = size
            num_files = max(self._num_files, len(self._done))
            expected = sum(self._size.values()) / len(self._size) * num_files if self._size else None
            total = sum(self._done.values())
            return total, total - sum(self._first.values()), expected


@contextlib.contextmanager
def _bars(console: Console, num_files: int) -> Iterator["DownloadProgress"]:
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    totals, tasks, lock = _Totals(num_files), {}, threading.Lock()
    with Progress(TextColumn("{task.description}", markup=False), *columns, console=console) as bars:
        overall = bars.add_task("all files", total=None)

        def progress(name: str, done: int, size: int | None) -> None:
            with lock:
                if name not in tasks:
                    tasks[name] = bars.add_task(name, total=size, completed=done)
            bars.update(tasks[name], completed=done, total=size, visible=done != size)
            total, _, expected = totals.update(name, done, size)
            bars.update(overall, completed=total, total=expected)

        yield progress


@contextlib.contextmanager
def _lines(console: Console, num_files: int) -> Iterator["DownloadProgress"]:
    from rich.filesize import decimal

    totals, start = _Totals(num_files), time.monotonic()
    said = start

    def progress(name: str, done: int, size: int | None) -> None:
        nonlocal said
        total, fetched, expected = totals.update(name, done, size)
        now = time.monotonic()
        if now - said < _PLAIN_PERIOD_SECONDS:
            return
        said = now
        speed = fetched / (now - start)
        left = f", about {(expected - total) / speed / 60:,.0f} min left" if expected and speed else ""
        of = f" of about {decimal(int(expected))}" if expected else ""
        console.print(f"{decimal(total)}{of}, {decimal(int(speed))}/s{left}", markup=False)

    yield progress
