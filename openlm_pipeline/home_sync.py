"""A home at an fsspec URL: finished artefacts go there, and come from there, between any number of machines.

Work is done in a local folder. An artefact is a folder of files; there it counts only with its `.artefact.json`, which
holds size and sha256 of each file, comes last and goes first. Of a run the records and each milestone are artefacts.
What is there already is not sent again, so a push that was cut goes on where it was. What was changed here since the
last push or pull is never overwritten by a pull. A store has no locks: let one machine at a time work on a run.
"""

import json
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from openlm_pipeline import remote
from openlm_pipeline.errors import DataError, MissingInputError
from openlm_pipeline.files import TMP_SUFFIX, read_json, sha256_file, write_json
from openlm_pipeline.runs.checkpoints import COMPLETE, read_checkpoint

MARK = ".artefact.json"
_RECORDS = ("experiment.yaml", "metrics.jsonl", "outcome.json", "run.json")
_OWN_MARKS = ("run.json", "tokenizer_info.json", "scorecard.json", "manifest.jsonl", COMPLETE)
"""Files by which readers know that the rest is there."""
_PRIVATE = re.compile(
    rf"\.lock|\.building|\.fetched|\.trash-.*|\.tmp-.*|.*{re.escape(TMP_SUFFIX)}|.*\.superseded-\d+|.*\.part-\d+\..*"
)
"""Names of what is unfinished, or of this machine only."""
_STATE = ".sync"
_THREADS = 4

Files = dict[str, dict[str, Any]]
"""`{"bytes", "sha256"}` of each file of an artefact, by its path in it."""


def _by_mark(name: str) -> tuple[bool, bool, str]:
    """Order in which files are put in place: descriptions after what they describe, marks last."""
    return (Path(name).name in _OWN_MARKS, name.endswith(".json"), name)


def _walk(folder: Path) -> Iterator[str]:
    for where, folders, names in os.walk(folder):
        folders[:] = [n for n in folders if not _PRIVATE.fullmatch(n)]
        for name in names:
            if name != MARK and not _PRIVATE.fullmatch(name):
                yield (Path(where) / name).relative_to(folder).as_posix()


@dataclass(frozen=True)
class HomeSync:
    """The way between a local folder and the URL that it works for."""

    root: Path
    url: str

    def push(self, folder: Path) -> None:
        """Send an artefact; of a run its records and all milestones.

        Raises:
            MissingInputError: there is nothing in it.
            ConfigError, DataError: the store does not take it. Nothing there looks whole that is not, nothing here is
                lost, and the next push goes on.
        """
        if not (folder / "run.json").exists():
            self._push(folder, sorted(_walk(folder), key=_by_mark))
            return
        self._make_way(folder)
        self._push(folder, [n for n in _RECORDS if (folder / n).exists()])
        for path in sorted((folder / "checkpoints").glob("step-*")):
            if (path / COMPLETE).exists() and not _PRIVATE.fullmatch(path.name) and read_checkpoint(path).milestone:
                self._push(path, sorted(_walk(path), key=_by_mark))

    def pull(self, folder: Path) -> None:
        """Bring every artefact at or below a folder whose files are missing here, or older than the store's.

        Raises:
            ConfigError, DataError: the store can't be read, or holds a damaged file. What is here stays as it was.
        """
        fs, where = remote.file_system(remote.join(self.url, self._name(folder)))
        with remote.storage_errors(remote.public(self.url), "can't be listed"):
            fs.invalidate_cache()
            found = fs.find(where)
        own: list[str] = []
        for mark in sorted((f for f in found if f.endswith(f"/{MARK}")), key=len):  # a run's records before the rest
            below = mark[len(where.rstrip("/")) : -len(MARK)].strip("/")
            if not any(below.startswith(name) for name in own) and not self._pull(folder / below):
                own.append(f"{below}/" if below else "")

    def _name(self, folder: Path) -> str:
        return folder.relative_to(self.root).as_posix()

    def _lock(self, folder: Path) -> FileLock:
        path = self.root / _STATE / self._name(folder)
        path.mkdir(parents=True, exist_ok=True)
        return FileLock(path / ".lock")

    def _note(self, folder: Path) -> Path:
        """What was the same here and there after the last push or pull."""
        return self.root / _STATE / self._name(folder) / "synced.json"

    def _noted(self, folder: Path) -> Files:
        return read_json(self._note(folder)) if self._note(folder).exists() else {}

    def _push(self, folder: Path, names: list[str]) -> None:
        if not names:
            raise MissingInputError(f"{folder} has no files to send to {remote.public(self.url)}")
        target = remote.join(self.url, self._name(folder))
        with self._lock(folder), tempfile.TemporaryDirectory() as scratch:
            source = folder
            if (folder / "run.json").exists():  # a trainer may add to the records at any time
                source = Path(scratch)
                for name in names:
                    shutil.copy2(folder / name, source / name)
            files = self._described(source, names, self._noted(folder))
            there = self._read_mark(target)
            if there != _plain(files):
                marks = [n for n in names if Path(n).name in _OWN_MARKS]
                for name in [MARK, *marks]:
                    self._remove(remote.join(target, name))
                rest = [n for n in names if n not in marks]
                with ThreadPoolExecutor(_THREADS, thread_name_prefix="push") as pool:
                    list(pool.map(lambda name: _send(source / name, target, name, files[name]), rest))
                for name in marks:
                    _send(source / name, target, name, files[name])
                mark = Path(scratch) / MARK
                write_json(mark, {"files": _plain(files)})
                remote.upload(mark, remote.join(target, MARK))
            write_json(self._note(folder), files)

    def _pull(self, folder: Path) -> bool:
        """Bring one artefact; False if what is here was changed here, and so stays."""
        source = remote.join(self.url, self._name(folder))
        with self._lock(folder):
            there = self._read_mark(source)
            if there is None:
                return True
            noted = self._noted(folder)
            here = self._described(folder, [n for n in {*there, *noted} if (folder / n).exists()], noted)
            wanted = [n for n in there if _plain(here).get(n) != there[n]]
            dropped = sorted(set(noted) - set(there))
            if any(n in here and _plain(here)[n] != _plain(noted).get(n) for n in [*wanted, *dropped]):
                return False
            if wanted:
                marks = [n for n in there if Path(n).name in _OWN_MARKS]
                wanted = sorted({*wanted, *marks}, key=_by_mark)
                self._bring(source, folder, wanted, marks, there)
            for name in dropped:
                (folder / name).unlink(missing_ok=True)
            write_json(
                self._note(folder), {n: {**there[n], "mtime_ns": (folder / n).stat().st_mtime_ns} for n in there}
            )
        return True

    def _bring(self, source: str, folder: Path, names: list[str], marks: list[str], there: Files) -> None:
        incoming = self.root / _STATE / f".tmp-{secrets.token_hex(4)}"
        try:
            with ThreadPoolExecutor(_THREADS, thread_name_prefix="pull") as pool:
                list(pool.map(lambda name: _fetch(source, name, incoming / name, there[name]), names))
            for name in marks:
                (folder / name).unlink(missing_ok=True)
            for name in names:
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                (incoming / name).replace(folder / name)
        finally:
            shutil.rmtree(incoming, ignore_errors=True)

    def _described(self, folder: Path, names: list[str], noted: Files) -> Files:
        """Size, hash and time of files; one that is as it was noted is not read again."""
        files: Files = {}
        for name in names:
            stat = (folder / name).stat()
            seen = {"bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns}
            old = noted.get(name, {})
            same = all(old.get(k) == v for k, v in seen.items())
            files[name] = {**seen, "sha256": old["sha256"] if same else sha256_file(folder / name)}
        return files

    def _make_way(self, run: Path) -> None:
        """Set another run that is in a run's place there aside, so that its milestones stay."""
        name = self._name(run)
        where = remote.join(self.url, name)
        there = self._read(remote.join(where, "run.json"))
        if there is None or there.get("fingerprint") == read_json(run / "run.json")["fingerprint"]:
            return
        fs, path = remote.file_system(where)
        path = path.rstrip("/")
        with remote.storage_errors(remote.public(where), "can't be set aside"):
            number = 1
            while fs.exists(f"{path}.superseded-{number}/run.json"):  # one without was not finished
                number += 1
            # The run's own description is copied last and removed last, so that a kill is noticed and done again.
            names = sorted((f[len(path) + 1 :] for f in fs.find(path)), key=lambda n: (n == "run.json", n))
            for name in names:
                fs.cp_file(f"{path}/{name}", f"{path}.superseded-{number}/{name}")
            for name in sorted(names, key=lambda n: (n == "run.json", Path(n).name != MARK, n)):
                fs.rm_file(f"{path}/{name}")

    def _read_mark(self, artefact: str) -> Files | None:
        mark = self._read(remote.join(artefact, MARK))
        if mark is None:
            return None
        files = mark.get("files") if isinstance(mark, dict) else None
        if not isinstance(files, dict) or any(Path(n).is_absolute() or ".." in Path(n).parts for n in files):
            raise DataError(f"{remote.public(remote.join(artefact, MARK))} does not describe an artefact")
        return files

    def _read(self, url: str) -> Any:
        """A JSON file there; None if it is missing."""
        try:
            with remote.open_remote(url) as f, remote.storage_errors(remote.public(url), "can't be read"):
                return json.loads(f.read())
        except MissingInputError:
            return None

    def _remove(self, url: str) -> None:
        fs, where = remote.file_system(url)
        with remote.storage_errors(remote.public(url), "can't be removed"):
            if fs.exists(where):
                fs.rm_file(where)


def _plain(files: Files) -> Files:
    """Without the times, which are this machine's."""
    return {name: {k: f[k] for k in ("bytes", "sha256")} for name, f in files.items()}


def _send(path: Path, target: str, name: str, described: dict[str, Any]) -> None:
    url = remote.join(target, name)
    if not remote.holds(url, size=described["bytes"], sha256=described["sha256"]):
        remote.upload(path, url)


def _fetch(source: str, name: str, path: Path, described: dict[str, Any]) -> None:
    remote.download(remote.join(source, name), path, size=described["bytes"], sha256=described["sha256"])
