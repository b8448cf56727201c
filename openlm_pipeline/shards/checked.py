"""Shards of datasets that have no sums of their samples, hashed in the background: once per machine, then remembered.

What was hashed is known by size and time of change, in `openlm_pipeline/checked_shards.jsonl` of the user's cache
folder. Where that can't be written, each process hashes for itself.
"""

import contextlib
import os
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import orjson

from openlm_pipeline.errors import DataError
from openlm_pipeline.shards.dataset import ShardedDataset

_POLL_SECONDS = 1.0


class CheckedShards:
    """The shards that this machine found whole."""

    def __init__(self) -> None:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        self._path = cache / "openlm_pipeline" / "checked_shards.jsonl"
        self._known: set[tuple[Any, ...]] = set()
        with contextlib.suppress(OSError):  # as below
            for line in self._path.read_bytes().splitlines():
                with contextlib.suppress(orjson.JSONDecodeError):  # a line that a full disk cut
                    self._known.add(tuple(orjson.loads(line)))

    def check(self, dataset: ShardedDataset, k: int) -> None:
        """Compare the hash of a local shard with the manifest's, unless that was done here since it changed.

        Raises:
            DataError: it is damaged or missing.
        """
        path = (dataset.folder / dataset.entries[k].tar).absolute()
        about = path.stat() if path.exists() else None
        note = (str(path), about.st_size, about.st_mtime_ns, dataset.entries[k].sha256) if about else ()
        if note in self._known:
            return
        dataset.check_shard(k)
        self._known.add(note)
        with contextlib.suppress(OSError):  # it is hashed again, by another process
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("ab") as f:
                f.write(orjson.dumps(note) + b"\n")


class BackgroundCheck:
    """A thread that checks shards in the order in which they are needed."""

    def __init__(self, needed: Callable[[int], Iterable[tuple[ShardedDataset, int]]]) -> None:
        """
        Args:
            needed: gives (dataset, shard) of all that were read by a step which do not lie in earlier answers.
        """
        self._needed = needed
        self._wanted = self._done = -1
        self._changed = threading.Condition()
        self._stopped = False
        self.problem: DataError | None = None
        """What is damaged, once it is found; then nothing more is checked."""
        self._thread = threading.Thread(target=self._run, name="shard-check", daemon=True)
        self._thread.start()

    def want(self, step: int) -> None:
        """Check what is read up to a step."""
        with self._changed:
            self._wanted = max(self._wanted, step)
            self._changed.notify_all()

    def reached(self, step: int, timeout: float = _POLL_SECONDS) -> bool:
        """Whether all that is read up to a step is checked, or damage was found; waits a little for it."""
        self.want(step)
        with self._changed:
            return self._changed.wait_for(lambda: self.problem is not None or self._done >= step, timeout)

    def close(self) -> None:
        """End the thread once it has read the shard it is at."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        self._thread.join()

    def _run(self) -> None:
        checked = CheckedShards()
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._stopped or self._wanted > self._done)
                if self._stopped:
                    return
                step = self._wanted
            problem = None
            try:
                for dataset, k in self._needed(step):
                    if self._stopped:
                        return
                    checked.check(dataset, k)
            except DataError as e:
                problem = e
            except Exception as e:  # noqa: BLE001 - whoever waits for this thread raises it
                problem = DataError(f"the shards can't be checked: {e}")
            with self._changed:
                self.problem, self._done = problem, step
                self._changed.notify_all()
            if problem:
                return
