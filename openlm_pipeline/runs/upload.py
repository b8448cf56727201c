"""A run's finished checkpoints and records at an fsspec URL: copied there while training goes on, and back.

`URL/name/version` has the run folder's layout. As on disk, a checkpoint there counts only with its `COMPLETE`, which
comes last and goes first. What is there already is not sent again, so an upload that was cut goes on where it was. A
store that fails stops no training: it is tried again with the next checkpoint and at the end, and a warning tells.
"""

import json
import re
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from openlm_pipeline import remote
from openlm_pipeline.errors import DataError, IdentityError, OpenLMError
from openlm_pipeline.runs.checkpoints import (
    COMPLETE,
    INFO,
    Checkpoint,
    checked_info,
    clear_unfinished,
    describe_file,
    folder_name,
    list_checkpoints,
    outdated,
    publish,
    unfinished,
)
from openlm_pipeline.runs.folder import RunFolder

_LAST_ATTEMPTS = 3
_RECORDS = ("run.json", "experiment.yaml", "metrics.jsonl", "outcome.json")


class Uploads:
    """Copies of one run, made in a thread by the process that holds the run's lock."""

    def __init__(
        self, run: RunFolder, url: str, *, keep: int, warn: Callable[[str], None], pause_seconds: float = 5.0
    ) -> None:
        """
        Args:
            url: of the run, without its secrets: credentials come from the environment.
            keep: checkpoints kept there that are not milestones.
            pause_seconds: before what failed is tried again at the end.
        """
        self.run, self.url, self.keep, self.warn, self.pause_seconds = run, url, keep, warn, pause_seconds
        self._waiting: dict[int, Checkpoint] = {}
        self._sending: int | None = None
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="upload")

    def start(self, max_step: int) -> None:
        """Check that the place is this run's or free, send what is only here, or fetch if there is no checkpoint here.

        All milestones up to `max_step` come, and the newest of all checkpoints up to there.

        Raises:
            IdentityError: another run is there.
            ConfigError, DataError: it can't be read, and there is nothing on this machine to go on from.
        """
        local = list_checkpoints(self.run.checkpoints, self.run.fingerprint, self.warn)
        try:
            there = self._read_json("run.json")
        except DataError as e:
            if not local:
                raise
            self.warn(f"{e}. Training goes on; uploads will be tried again")
            there = None
        if there is not None and there.get("fingerprint") != self.run.fingerprint:
            raise IdentityError(
                f"{remote.public(self.url)} holds another run. Give the recipe another `version` or `execution."
                "upload_to`, or remove what is there"
            )
        if there is not None and not local:
            self._fetch_all(max_step)
        with self._lock:
            self._waiting = {c.step: c for c in local}  # an earlier process may not have sent them all
        if local:
            self._pool.submit(self._send_waiting)

    @property
    def steps(self) -> set[int]:
        """Checkpoints that wait to be sent or are being sent: not to be deleted."""
        with self._lock:
            return set(self._waiting)

    def add(self, checkpoint: Checkpoint) -> None:
        """Send a finished checkpoint soon. One that waits and is no milestone gives way to a newer one."""
        with self._lock:
            self._waiting = {s: c for s, c in self._waiting.items() if c.milestone or s == self._sending}
            self._waiting[checkpoint.step] = checkpoint
        self._pool.submit(self._send_waiting)

    def finish(self) -> None:
        """Wait until all is there; after some attempts say what is not."""
        for attempt in range(1, _LAST_ATTEMPTS + 1):
            result: Future[bool] = self._pool.submit(self._send_waiting)
            if result.result() and not self.steps:
                break
            if attempt < _LAST_ATTEMPTS:
                threading.Event().wait(self.pause_seconds)
        else:
            left = ", ".join(folder_name(s) for s in sorted(self.steps)) or "records"
            self.warn(
                f"{left} of {self.run.path} could not be copied to {remote.public(self.url)}; start the run again to "
                "try again"
            )
        self._pool.shutdown()

    def _send_waiting(self) -> bool:
        """Whether everything that waited is there now; runs in the one thread of the pool."""
        try:
            while True:
                with self._lock:
                    if not self._waiting:
                        break
                    checkpoint = self._waiting[min(self._waiting)]
                    self._sending = checkpoint.step
                self._send(checkpoint)
                with self._lock:
                    if self._waiting[checkpoint.step] is checkpoint:  # else it became a milestone meanwhile
                        del self._waiting[checkpoint.step]
            self._send_records()
            return True
        except (OpenLMError, OSError) as e:
            self.warn(f"{e}. Training goes on; the upload will be tried again")
            return False
        finally:
            self._sending = None

    def _send(self, checkpoint: Checkpoint) -> None:
        target = self._checkpoint_url(checkpoint)
        info = checkpoint.path / INFO
        if not self._holds(info, target):
            self._remove(f"{target}/{COMPLETE}")  # of another checkpoint of this step, that was damaged here
            for name, recorded in checkpoint.files.items():
                if not remote.holds(f"{target}/{name}", **_as_arguments(recorded)):
                    remote.upload(checkpoint.path / name, f"{target}/{name}")
            remote.upload(info, f"{target}/{INFO}")
        if not self._exists(f"{target}/{COMPLETE}"):
            remote.upload(checkpoint.path / COMPLETE, f"{target}/{COMPLETE}")
        for old in outdated(self._remote_checkpoints(), self.keep):
            self._remove(f"{self._checkpoint_url(old)}/{COMPLETE}")
            self._remove(self._checkpoint_url(old))

    def _send_records(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            for name in _RECORDS:
                path = self.run.path / name
                if path.exists():
                    copy = Path(folder) / name  # the run may add to its own at any time
                    copy.write_bytes(path.read_bytes())
                    if not self._holds(copy, self.url):
                        remote.upload(copy, remote.join(self.url, name))

    def _fetch_all(self, max_step: int) -> None:
        has_newest = False
        for checkpoint in reversed([c for c in self._remote_checkpoints() if c.step <= max_step]):
            if checkpoint.milestone is None and has_newest:
                continue
            try:
                self._fetch(checkpoint)
                has_newest = True
            except DataError as e:
                self.warn(f"checkpoint {checkpoint.path.name} is not fetched: {e}")
        if not self.run.metrics_file.exists() and self._exists(remote.join(self.url, "metrics.jsonl")):
            remote.download(remote.join(self.url, "metrics.jsonl"), self.run.metrics_file)

    def _fetch(self, checkpoint: Checkpoint) -> None:
        source, tmp = self._checkpoint_url(checkpoint), unfinished(self.run.checkpoints, checkpoint.step)
        clear_unfinished(self.run.checkpoints)
        for name, recorded in checkpoint.files.items():
            remote.download(f"{source}/{name}", tmp / name, **_as_arguments(recorded))
        remote.download(f"{source}/{INFO}", tmp / INFO)
        publish(tmp, checkpoint.path)
        self.warn(f"{checkpoint.path.name} was fetched from {remote.public(self.url)}")

    def _remote_checkpoints(self) -> list[Checkpoint]:
        """Complete checkpoints there by step; a damaged description is reported and passed over."""
        folder = remote.join(self.url, "checkpoints")
        found = []
        for name in self._names(folder):
            if not re.fullmatch(r"step-\d{8}", name) or not self._exists(f"{folder}/{name}/{COMPLETE}"):
                continue
            file = f"checkpoints/{name}/{INFO}"
            try:
                checkpoint = checked_info(self._read_json(file), self.run.checkpoints / name, remote.public(file))
            except DataError as e:
                self.warn(f"checkpoint {name} at {remote.public(self.url)} is passed over: {e}")
                continue
            if checkpoint.run_fingerprint == self.run.fingerprint:
                found.append(checkpoint)
        return found

    def _checkpoint_url(self, checkpoint: Checkpoint) -> str:
        return remote.join(self.url, f"checkpoints/{folder_name(checkpoint.step)}")

    def _holds(self, path: Path, folder: str) -> bool:
        return remote.holds(remote.join(folder, path.name), **_as_arguments(describe_file(path)))

    def _read_json(self, name: str) -> Any:
        """A JSON file there; None if it is missing."""
        url = remote.join(self.url, name)
        if not self._exists(url):
            return None
        with remote.open_remote(url) as f, remote.storage_errors(remote.public(url), "can't be read"):
            return json.loads(f.read())

    def _exists(self, url: str) -> bool:
        fs, where = remote.file_system(url)
        with remote.storage_errors(remote.public(url), "can't be looked up"):
            fs.invalidate_cache()
            return fs.exists(where)

    def _names(self, folder: str) -> list[str]:
        fs, where = remote.file_system(folder)
        with remote.storage_errors(remote.public(folder), "can't be listed"):
            fs.invalidate_cache()
            return (
                sorted(p.rstrip("/").rsplit("/", 1)[-1] for p in fs.ls(where, detail=False)) if fs.exists(where) else []
            )

    def _remove(self, url: str) -> None:
        fs, where = remote.file_system(url)
        with remote.storage_errors(remote.public(url), "can't be removed"):
            fs.invalidate_cache()
            if fs.exists(where):
                fs.rm(where, recursive=True)


def _as_arguments(recorded: dict[str, Any]) -> dict[str, Any]:
    """A file's recorded size and hash as arguments of `remote`."""
    return {"size": recorded["bytes"], "sha256": recorded["sha256"]}
