"""Shards of a dataset in a local folder, each brought there once, when it is needed or ahead of that.

Where a shard comes from is the caller's: a store gets a function that makes its file. Processes may share the folder:
a shard that one of them is bringing is waited for. Notes in `.fetched/` tell what a store brought; only that may be
removed to keep the folder below `cache_bytes`, the longest unused first.
"""

import contextlib
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from filelock import FileLock, Timeout

from openlm_pipeline.errors import ConfigError
from openlm_pipeline.storage.files import make_folder, sha256_file, write_text
from openlm_pipeline.waits import waiting_for

FETCHED = ".fetched"
_THREADS = 4


@contextlib.contextmanager
def only_one(folder: Path, name: str) -> Iterator[None]:
    """Hold the lock for bringing the file `name` to `folder`, among the processes and threads of this machine."""
    make_folder(folder / FETCHED)
    with FileLock(folder / FETCHED / f"{name}.lock"):
        yield


class ShardStore:
    """Files of shards by number."""

    def __init__(
        self,
        folder: Path,
        names: Sequence[str],
        sizes_bytes: Sequence[int],
        hashes: Sequence[str | None],
        bring: Callable[[int, Path], None],
        cache_bytes: int | None = None,
    ) -> None:
        """
        Args:
            names: of the files.
            hashes: their sha256, None where it is known only once the file is made.
            bring: makes the file of a shard, whole and under its name or not at all.
            cache_bytes: what the files that were brought may take; None for no limit.

        Raises:
            ConfigError: the largest shard takes more than `cache_bytes`.
        """
        self._largest = max(sizes_bytes, default=0)
        if cache_bytes is not None and cache_bytes < self._largest:
            raise ConfigError(
                f"a cache of {cache_bytes} bytes can't hold one shard of {folder}, which has up to {self._largest} "
                "bytes; raise cache_bytes"
            )
        self._folder, self._names, self._sizes, self._hashes = folder, names, sizes_bytes, hashes
        self._bring, self._cache_bytes = bring, cache_bytes
        self._checked: set[int] = set()
        self._running: dict[int, Future[None]] = {}
        self._wanted: list[int] = []
        self._lock = threading.RLock()
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="shards")

    def path(self, k: int) -> Path:
        """The file of a shard, brought if need be; it may be removed again once others are needed.

        Raises:
            OpenLMError: it can't be brought, as `bring` says.
        """
        with self._lock:
            path = self._file(k)
            if self._is_ready(k):
                with contextlib.suppress(FileNotFoundError):
                    os.utime(path)
                    return path
            future = self._running.get(k) or self._start(k)
        with waiting_for(f"shard {path}, which is being brought"):
            future.result()
        return path

    @contextlib.contextmanager
    def held(self, k: int) -> Iterator[Path]:
        """The file of a shard, which no process removes inside the `with`; a mapping made there stays valid after."""
        while True:
            path = self.path(k)
            with only_one(self._folder, path.name):
                if path.exists():
                    yield path
                    return

    def has(self, k: int) -> bool:
        """Whether the file of a shard is there now."""
        return self._file(k).exists()

    def prefetch(self, shards: Sequence[int]) -> None:
        """Bring these shards in the background, in this order, as many as fit beside one that is in use.

        Each call replaces the one before. An error shows when the shard is asked for.
        """
        free = None if self._cache_bytes is None else self._cache_bytes - self._largest
        wanted = []
        for k in shards:
            if free is not None and (free := free - self._sizes[k]) < 0:
                break
            wanted.append(k)
        with self._lock:
            self._wanted = wanted
            self._start_wanted()

    def _file(self, k: int) -> Path:
        return self._folder / self._names[k]

    def _note(self, k: int) -> Path:
        return self._folder / FETCHED / self._names[k]

    def _is_ready(self, k: int) -> bool:
        return k in self._checked and self.has(k)

    def _start(self, k: int) -> "Future[None]":
        future = self._running[k] = self._pool.submit(self._ensure, k)
        future.add_done_callback(lambda done: self._finished(k, done))
        return future

    def _start_wanted(self) -> None:
        # Never more than there are threads, so that what is needed at once need not wait for all of them.
        for k in self._wanted:
            if len(self._running) >= _THREADS:
                return
            if k not in self._running and not self._is_ready(k):
                self._start(k)

    def _finished(self, k: int, done: "Future[None]") -> None:
        with self._lock:
            del self._running[k]
            if done.exception() is not None:
                self._wanted = [w for w in self._wanted if w != k]
            with contextlib.suppress(RuntimeError):  # the program is ending, and takes no new work
                self._start_wanted()

    def _ensure(self, k: int) -> None:
        path, note = self._file(k), self._note(k)
        with only_one(self._folder, path.name):
            if not self._is_whole(k):
                self._make_room(k)
                self._bring(k, path)
                write_text(note, self._hashes[k] or sha256_file(path))
            self._checked.add(k)

    def _is_whole(self, k: int) -> bool:
        path, expected = self._file(k), self._hashes[k]
        with contextlib.suppress(FileNotFoundError):
            expected = expected or self._note(k).read_text()
            return path.stat().st_size == self._sizes[k] and sha256_file(path) == expected
        return False

    def _make_room(self, k: int) -> None:
        """Remove brought files so that shard `k` fits beside what else is being brought."""
        if self._cache_bytes is None:
            return
        with self._lock:
            needed = sum(self._sizes[j] for j in {k, *self._running})
            keep = {k, *self._running, *self._wanted}
        brought = []
        for j, name in enumerate(self._names):
            with contextlib.suppress(FileNotFoundError):
                if self._note(j).exists() and j not in self._running:
                    about = (self._folder / name).stat()
                    brought.append((about.st_mtime_ns, j, about.st_size))
        excess = needed + sum(size for *_, size in brought) - self._cache_bytes
        for _, j, size in sorted(brought):
            if excess <= 0:
                return
            if j not in keep and self._remove(j):
                excess -= size

    def _remove(self, k: int) -> bool:
        lock = FileLock(self._folder / FETCHED / f"{self._names[k]}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:  # someone brings or maps it now
            return False
        try:
            self._file(k).unlink(missing_ok=True)
            self._note(k).unlink(missing_ok=True)
        finally:
            lock.release()
        return True
