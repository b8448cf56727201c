"""A folder copied to a store or from one, so that it looks whole only when it is.

Files go in any order, several at once. Marks, by which readers know that the rest is there, come last and go first.
What the store has whole is not sent again, so a copy that was cut resumes where it was.
"""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from openlm_pipeline.storage import remote
from openlm_pipeline.storage.files import sha256_file

_THREADS = 4

Files = dict[str, dict[str, Any]]
"""`{"bytes", "sha256"}` of each file of a folder, by its path in it."""


def describe_file(path: Path) -> dict[str, Any]:
    """`{"bytes", "sha256"}` of a file."""
    return {"bytes": path.stat().st_size, "sha256": sha256_file(path)}


def holds(url: str, described: Mapping[str, Any]) -> bool:
    """Whether the store has a file of this size and hash at `url`."""
    return remote.holds(url, size=described["bytes"], sha256=described["sha256"])


def send(
    paths: Mapping[str, Path],
    url: str,
    files: Files,
    marks: Sequence[str],
    *,
    describes: str | None = None,
    before: Callable[[str], None] | None = None,
    after: Callable[[int], None] | None = None,
) -> int:
    """Send the files of a folder to the folder `url`.

    Args:
        paths: where each file is here, by its name there.
        files: size and hash of each.
        marks: names that come last, in this order, and go first, in reverse.
        describes: the mark that has the hashes of all files: where the store holds it, the rest is there too.
        before: called with the name of a file that is about to be sent; it may raise.
        after: called with the number of files that are there, after each one.

    Returns:
        How many files were sent; the others were there.

    Raises:
        ConfigError, DataError: the store does not take a file whole. Nothing there looks whole that is not.
    """

    def one(name: str) -> bool:
        target = remote.join(url, name)
        if holds(target, files[name]):
            return False
        if before:
            before(name)
        remote.upload(paths[name], target)
        return True

    sent = done = 0
    rest = [name for name in paths if name not in marks]
    if describes is None or not holds(remote.join(url, describes), files[describes]):
        if describes is not None:
            for name in reversed(marks):
                remote.remove(remote.join(url, name))
        with ThreadPoolExecutor(_THREADS, thread_name_prefix="send") as pool:
            futures = [pool.submit(one, name) for name in rest]
            try:
                for future in as_completed(futures):
                    sent += future.result()
                    done += 1
                    if after:
                        after(done)
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
    return sent + sum(one(name) for name in marks)


def fetch(url: str, files: Files, into: Path) -> None:
    """Fetch files of the folder `url` into a folder that nobody reads yet; each must have its size and hash.

    Raises:
        MissingInputError, ConfigError, DataError: a file can't be read, or is damaged there.
    """

    def one(name: str) -> None:
        described = files[name]
        remote.download(remote.join(url, name), into / name, size=described["bytes"], sha256=described["sha256"])

    with ThreadPoolExecutor(_THREADS, thread_name_prefix="fetch") as pool:
        list(pool.map(one, files))
