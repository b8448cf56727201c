"""A home at an fsspec URL: finished artefacts go there, and come from there, between any number of machines.

Work is done in a local folder. An artefact is a folder of files; there it counts only with its `.artefact.json`, which
holds size and sha256 of each file, comes last and goes first. Of a run the records and each milestone are artefacts.
What is there already is not sent again, so a push that was cut resumes where it was. What was changed here since the
last push or pull is never overwritten by a pull. A store has no locks: let one machine at a time work on a run.
"""

import contextlib
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from openlm_pipeline.errors import DataError, MissingInputError
from openlm_pipeline.storage import copies, remote
from openlm_pipeline.storage.files import (
    TMP_SUFFIX,
    check_inside,
    make_folder,
    read_json,
    rename,
    sha256_file,
    write_json,
)
from openlm_pipeline.waits import waiting_for

MARK = ".artefact.json"
_OWN_MARKS = ("run.json", "tokenizer_info.json", "scorecard.json", "manifest.jsonl", "COMPLETE")
"""Files by which readers know that the rest is there."""
_PRIVATE = re.compile(
    rf"\.lock|\.building|\.fetched|\.trash-.*|\.tmp-.*|.*{re.escape(TMP_SUFFIX)}|.*\.superseded-\d+|.*\.part-\d+\..*"
)
"""Names of what is unfinished, or of this machine only."""
_STATE = ".sync"


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

    def push(self, folder: Path, names: Sequence[str] | None = None) -> None:
        """Send an artefact.

        Args:
            names: the files that are it, which may be written meanwhile; by default all that are in the folder.

        Raises:
            MissingInputError: there is nothing in it.
            ConfigError, DataError: the store does not take it. Nothing there looks whole that is not, nothing here is
                lost, and the next push resumes.
        """
        with self._lock(folder), tempfile.TemporaryDirectory() as scratch:
            source = folder
            if names is not None:
                source = Path(scratch) / "files"
                source.mkdir()
                for name in names:
                    shutil.copy2(folder / name, source / name)
            found = sorted(_walk(folder) if names is None else names, key=_by_mark)
            if not found:
                raise MissingInputError(f"{folder} has no files to send to {remote.public(self.url)}")
            files = self._described(source, found, self._noted(folder))
            mark = Path(scratch) / MARK
            write_json(mark, {"files": _plain(files)})
            copies.send(
                {**{name: source / name for name in found}, MARK: mark},
                remote.join(self.url, self._name(folder)),
                {**files, MARK: copies.describe_file(mark)},
                [*(n for n in found if Path(n).name in _OWN_MARKS), MARK],
                describes=MARK,
            )
            write_json(self._note(folder), files)

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

    @contextlib.contextmanager
    def _lock(self, folder: Path) -> Iterator[None]:
        path = self.root / _STATE / self._name(folder)
        make_folder(path)
        lock = FileLock(path / ".lock")
        with waiting_for(f"another process that copies {folder} to or from {remote.public(self.url)}"):
            lock.acquire()
        try:
            yield
        finally:
            lock.release()

    def _note(self, folder: Path) -> Path:
        """What was the same here and there after the last push or pull."""
        return self.root / _STATE / self._name(folder) / "synced.json"

    def _noted(self, folder: Path) -> copies.Files:
        return read_json(self._note(folder)) if self._note(folder).exists() else {}

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

    def _bring(self, source: str, folder: Path, names: list[str], marks: list[str], there: copies.Files) -> None:
        incoming = self.root / _STATE / f".tmp-{secrets.token_hex(4)}"
        try:
            copies.fetch(source, {name: there[name] for name in names}, incoming)
            for name in marks:
                (folder / name).unlink(missing_ok=True)
            for name in names:
                make_folder((folder / name).parent)
                rename(incoming / name, folder / name)
        finally:
            shutil.rmtree(incoming, ignore_errors=True)

    def _described(self, folder: Path, names: list[str], noted: copies.Files) -> copies.Files:
        """Size, hash and time of files; one that is as it was noted is not read again."""
        files: copies.Files = {}
        for name in names:
            stat = (folder / name).stat()
            seen = {"bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns}
            old = noted.get(name, {})
            same = all(old.get(k) == v for k, v in seen.items())
            files[name] = {**seen, "sha256": old["sha256"] if same else sha256_file(folder / name)}
        return files

    def make_way(self, run: Path) -> None:
        """Set another run that is in a run's place there aside, so that its milestones stay."""
        name = self._name(run)
        where = remote.join(self.url, name)
        there = remote.read_json_at(remote.join(where, "run.json"))
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

    def _read_mark(self, artefact: str) -> copies.Files | None:
        mark = remote.read_json_at(remote.join(artefact, MARK))
        if mark is None:
            return None
        files = mark.get("files") if isinstance(mark, dict) else None
        if not isinstance(files, dict):
            raise DataError(f"{remote.public(remote.join(artefact, MARK))} does not describe an artefact")
        check_inside(files, remote.public(remote.join(artefact, MARK)))
        return files


def _plain(files: copies.Files) -> copies.Files:
    """Without the times, which are this machine's."""
    return {name: {k: f[k] for k in ("bytes", "sha256")} for name, f in files.items()}
