"""Shards of datasets that have no sums of their samples, hashed in the background, once per machine."""

import threading
from collections.abc import Callable, Iterable

from openlm_pipeline.errors import DataError
from openlm_pipeline.shards.dataset import ShardedDataset
from openlm_pipeline.storage.file_hashes import FileHashes

_POLL_SECONDS = 1.0


class CheckedShards:
    """The shards that this machine found whole."""

    def __init__(self) -> None:
        self._hashes = FileHashes()

    def check(self, dataset: ShardedDataset, k: int) -> None:
        """Compare the hash of a local shard with the manifest's.

        Raises:
            DataError: it is damaged or missing.
        """
        path = dataset.folder / dataset.entries[k].tar
        if not path.exists() or self._hashes.sha256(path) != dataset.entries[k].sha256:
            dataset.check_shard(k)


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
