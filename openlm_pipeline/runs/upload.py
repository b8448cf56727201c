"""A run's finished checkpoints and records at an fsspec URL: copied there while training continues, and back.

`URL/name/version` has the run folder's layout. As on disk, a checkpoint there counts only with its `COMPLETE`, which
comes last and goes first. What is there already is not sent again, so an upload that was cut resumes where it was. A
store that fails stops no training: it is tried again with the next checkpoint and at the end, and a warning tells.
"""

import re
import tempfile
import threading
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from openlm_pipeline.checkpoints.folders import (
    COMPLETE,
    INFO,
    Checkpoint,
    checked_info,
    clear_unfinished,
    folder_name,
    list_checkpoints,
    outdated,
    publish,
    unfinished,
)
from openlm_pipeline.errors import DataError, IdentityError, OpenLMError
from openlm_pipeline.runs.folder import RunFolder
from openlm_pipeline.storage import copies, remote
from openlm_pipeline.storage.files import atomic_writer
from openlm_pipeline.storage.home import Home
from openlm_pipeline.waits import waiting_for

_LAST_ATTEMPTS = 3
_PART_BYTES = 8 << 20
_RECORDS = (
    "run.json",
    "experiment.yaml",
    "outcome.json",
    "ledger.jsonl",  # each says how long the next one is at least, so it is read before
    "metrics.jsonl",
    "attention.json",
    "environments.jsonl",
    "wandb_id.txt",
)


def _part_name(name: str, number: int) -> str:
    """A record that grows for months is sent in parts, so that what is there need not be sent again."""
    return f"{name}.{number}" if number else name


def _parts(path: Path, sent: Collection[str]) -> Iterator[tuple[str, bytes]]:
    """(name, content) of the parts of a file that were not sent; none where there is no file."""
    if not path.exists():
        return
    with path.open("rb") as file:
        for number in range(max(1, -(-path.stat().st_size // _PART_BYTES))):
            if (name := _part_name(path.name, number)) not in sent:
                file.seek(number * _PART_BYTES)
                yield name, file.read(_PART_BYTES)


def push_run(home: Home, run: RunFolder, only: Checkpoint | None = None) -> None:
    """Send a run's records and milestones to the home's URL, each as an artefact. Nothing for a local home.

    Args:
        only: the one milestone that is new there.

    Raises:
        ConfigError, DataError: the store does not take them; the next push resumes.
    """
    if home.sync is None:
        return
    home.sync.make_way(run.path)
    home.sync.push(run.path, [name for name in _RECORDS if (run.path / name).exists()])
    for checkpoint in [only] if only else run.saved():
        if checkpoint.milestone:
            home.sync.push(checkpoint.path)


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
        self._there: dict[int, Checkpoint] | None = None
        self._parts_sent = set[str]()
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="upload")

    def start(self, max_step: int) -> None:
        """Check that the place is this run's or free, send what is only here, or fetch if there is no checkpoint here.

        All milestones up to `max_step` come, and the newest of all checkpoints up to there.

        Raises:
            IdentityError: another run is there.
            ConfigError, DataError: it can't be read, and there is nothing on this machine to continue from.
        """
        local = list_checkpoints(self.run.checkpoints, self.run.fingerprint, self.warn)
        try:
            there = remote.read_json_at(remote.join(self.url, "run.json"))
        except DataError as e:
            if not local:
                raise
            self.warn(f"{e}. Training continues; uploads will be tried again")
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
            with waiting_for(f"checkpoints and records to be copied to {remote.public(self.url)}"):
                sent = result.result()
            if sent and not self.steps:
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
            self.warn(f"{e}. Training continues; the upload will be tried again")
            return False
        finally:
            self._sending = None

    def _send(self, checkpoint: Checkpoint) -> None:
        names = [*checkpoint.files, INFO, COMPLETE]
        described = {name: copies.describe_file(checkpoint.path / name) for name in (INFO, COMPLETE)}
        copies.send(
            {name: checkpoint.path / name for name in names},
            self._checkpoint_url(checkpoint),
            {**checkpoint.files, **described},
            [INFO, COMPLETE],
            describes=INFO,
        )
        if self._there is None:  # once: each is a request or two
            self._there = {c.step: c for c in self._remote_checkpoints()}
        self._there[checkpoint.step] = checkpoint
        for old in outdated([self._there[step] for step in sorted(self._there)], self.keep):
            remote.remove(f"{self._checkpoint_url(old)}/{COMPLETE}")
            remote.remove(self._checkpoint_url(old))
            del self._there[old.step]

    def _send_records(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            for name in _RECORDS:
                for part, data in _parts(self.run.path / name, self._parts_sent):
                    copy = Path(folder) / part  # the run may add to its own at any time
                    copy.write_bytes(data)
                    if not copies.holds(remote.join(self.url, part), copies.describe_file(copy)):
                        remote.upload(copy, remote.join(self.url, part))
                    if len(data) == _PART_BYTES:
                        self._parts_sent.add(part)

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
        for file in (self.run.metrics_file, self.run.ledger_file, self.run.attention_file, self.run.wandb_file):
            if not file.exists() and remote.exists(remote.join(self.url, file.name)):
                self._fetch_record(file)

    def _fetch_record(self, file: Path) -> None:
        with tempfile.TemporaryDirectory() as folder, atomic_writer(file) as whole:
            part, number = Path(folder) / "part", 0
            while not number or remote.exists(remote.join(self.url, _part_name(file.name, number))):
                remote.download(remote.join(self.url, _part_name(file.name, number)), part)
                whole.write(part.read_bytes())
                number += 1

    def _fetch(self, checkpoint: Checkpoint) -> None:
        source, tmp = self._checkpoint_url(checkpoint), unfinished(self.run.checkpoints, checkpoint.step)
        clear_unfinished(self.run.checkpoints)
        copies.fetch(source, checkpoint.files, tmp)
        remote.download(f"{source}/{INFO}", tmp / INFO)
        publish(tmp, checkpoint.path)
        self.warn(f"{checkpoint.path.name} was fetched from {remote.public(self.url)}")

    def _remote_checkpoints(self) -> list[Checkpoint]:
        """Complete checkpoints there by step; a damaged description is reported and passed over."""
        folder = remote.join(self.url, "checkpoints")
        found = []
        for name in remote.names_in(folder):
            if not re.fullmatch(r"step-\d{8}", name) or not remote.exists(f"{folder}/{name}/{COMPLETE}"):
                continue
            file = remote.join(folder, f"{name}/{INFO}")
            try:
                info = remote.read_json_at(file)
                checkpoint = checked_info(info, self.run.checkpoints / name, remote.public(file))
            except DataError as e:
                self.warn(f"checkpoint {name} at {remote.public(self.url)} is passed over: {e}")
                continue
            if checkpoint.run_fingerprint == self.run.fingerprint:
                found.append(checkpoint)
        return found

    def _checkpoint_url(self, checkpoint: Checkpoint) -> str:
        return remote.join(self.url, f"checkpoints/{folder_name(checkpoint.step)}")
