"""What a folder may look like after the power went: a recorder of its changes, and the states that a disk may be in.

A file system promises the content of a file after its `fsync`, and a name after the `fsync` of its folder. Whatever
was changed since may be there, lost, cut or filled with zeros, each file and each name for itself.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

Names = dict[int, dict[str, int]]
"""Folder -> name -> file or folder, each by a number of its own."""
_CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.link"}
_WRITING = os.O_WRONLY | os.O_RDWR
LOST, HALF, ZEROS, WHOLE = "lost", "half", "zeros", "whole"
"""What is left of content that was not synced."""
OLD, NEW, MIXED = "old names", "new names", "mixed names"
"""Which names are left where the folder was not synced."""
VARIANTS = tuple(itertools.product((LOST, HALF, ZEROS, WHOLE), (OLD, NEW, MIXED)))
MARKS = ("tokenizer_info.json", "manifest.jsonl", "run.json", "COMPLETE", "scorecard.json", "export.json")
_ROOT = 0


@dataclass(frozen=True)
class Moment:
    """A folder just before one of its changes."""

    change: str
    seen: Names
    """Names as programs see them."""
    synced: Names
    content: dict[int, bytes]
    """Of files, as programs see it, or last saw it."""
    synced_content: dict[int, bytes]
    mtimes_ns: dict[int, int]

    def after_power_loss(self, content: str, names: str, seed: str) -> State:
        """A state that the disk may be in afterwards."""
        rng = random.Random(seed)
        files: dict[str, tuple[bytes, int] | None] = {}
        placed: set[int] = set()

        def left(folder: int) -> dict[str, int]:
            old, new = self.synced.get(folder, {}), self.seen.get(folder, {})
            if names != MIXED:
                return old if names == OLD else new
            chosen = {n: rng.choice((old, new)).get(n) for n in sorted({*old, *new})}
            return {n: number for n, number in chosen.items() if number is not None}

        def fill(folder: int, path: str) -> None:
            for name, number in sorted(left(folder).items()):
                if number in self.content:
                    files[path + name] = (self._left_of(number, content), self.mtimes_ns[number])
                elif number not in placed:  # a folder is in one place
                    placed.add(number)
                    files[f"{path}{name}/"] = None
                    fill(number, f"{path}{name}/")

        fill(_ROOT, "")
        return State(files)

    def _left_of(self, file: int, how: str) -> bytes:
        old, new = self.synced_content.get(file, b""), self.content[file]
        if how in (LOST, WHOLE) or old == new:
            return old if how == LOST else new
        kept = old if new.startswith(old) else b""
        rest = new[len(kept) :]
        return kept + (rest[: len(rest) // 2] if how == HALF else bytes(len(rest)))

    def lost_marks(self) -> list[str]:
        """Marks that are synced with their names, in folders that the disk may not have."""
        found = []

        def look(folder: int, path: str, reached: bool) -> None:
            for name, number in self.seen[folder].items():
                here = self.synced.get(folder, {}).get(name) == number
                if number not in self.content:
                    look(number, f"{path}{name}/", reached and here)
                elif here and not reached and name in MARKS:
                    found.append(path + name)

        look(_ROOT, "", True)
        return found


@dataclass(frozen=True)
class State:
    """Files with their content and time of change, and folders, whose names end with `/`."""

    files: dict[str, tuple[bytes, int] | None]

    @property
    def key(self) -> int:
        return hash(tuple((name, file and file[0]) for name, file in sorted(self.files.items())))

    def write(self, root: Path) -> None:
        root.mkdir(parents=True)
        for name, file in sorted(self.files.items()):
            if file is None:
                (root / name).mkdir()
            else:
                (root / name).write_bytes(file[0])
                os.utime(root / name, ns=(file[1], file[1]))


@dataclass
class Recorder:
    """Each change below a folder that this process makes."""

    root: Path
    moments: list[Moment] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._lock, self._inside = threading.RLock(), threading.local()
        self._count = itertools.count(_ROOT)
        self._numbers: dict[int, int] = {}
        self._content: dict[int, bytes] = {}
        self._mtimes_ns: dict[int, int] = {}
        self._read: dict[int, tuple[Any, bytes]] = {}
        self._synced: Names = {}
        self._synced_content: dict[int, bytes] = {}
        self._synced, self._synced_content = self._look(), dict(self._content)

    def _look(self) -> Names:
        numbers: dict[int, int] = {}
        seen: Names = {}

        def number(stat: os.stat_result) -> int:
            if stat.st_ino not in numbers:  # the number of a file that is gone may be given to another
                old = self._numbers.get(stat.st_ino)
                numbers[stat.st_ino] = next(self._count) if old is None else old
            return numbers[stat.st_ino]

        def walk(folder: Path) -> None:
            names = seen.setdefault(number(folder.stat()), {})
            for path in sorted(folder.iterdir()):
                with contextlib.suppress(FileNotFoundError):  # another thread removed it
                    stat = path.stat()
                    names[path.name] = file = number(stat)
                    if path.is_dir():
                        walk(path)
                        continue
                    stamp = (stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
                    if self._read.get(file, (None,))[0] != stamp:
                        self._read[file] = (stamp, path.read_bytes())
                    self._content[file], self._mtimes_ns[file] = self._read[file][1], stat.st_mtime_ns

        walk(self.root)
        self._numbers = numbers
        return seen

    def note(self, change: str) -> None:
        """Remember how things are before a change."""
        seen = self._look()
        copies = map(dict, (self._synced, self._content, self._synced_content, self._mtimes_ns))
        self.moments.append(Moment(change, seen, *copies))

    def heard(self, event: str, arguments: tuple[Any, ...]) -> None:
        """A hook for `sys.addaudithook`."""
        if event == "open":
            name, _, flags = arguments
            if not isinstance(name, (str, os.PathLike)) or not flags & _WRITING:
                return
        elif event not in _CHANGES:
            return
        if getattr(self._inside, "now", False):
            return
        path = Path(os.fsdecode(arguments[0]))
        if not path.is_absolute() and isinstance(arguments[-1], int) and arguments[-1] >= 0 and event != "open":
            path = Path(f"/proc/self/fd/{arguments[-1]}").readlink() / path
        if self.root in path.absolute().parents:
            with self._alone():
                self.note(f"{event} {path.relative_to(self.root)}")

    def fsync(self, descriptor: int) -> None:
        """In the place of `os.fsync`."""
        with self._alone():
            path = Path(f"/proc/self/fd/{descriptor}").readlink()
            if path != self.root and self.root not in path.parents:
                return
            self.note(f"os.fsync {path.relative_to(self.root)}")
            number = self._numbers[os.fstat(descriptor).st_ino]
            if path.is_dir():
                self._synced[number] = self.moments[-1].seen[number]
            else:
                self._read.pop(number, None)  # what is written through a map may leave its time as it was
                self._synced_content[number] = path.read_bytes()

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        with self._lock:
            self._inside.now = True
            try:
                yield
            finally:
                self._inside.now = False


_listeners: list[Recorder] = []


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    for recorder in _listeners:
        recorder.heard(event, arguments)


@contextlib.contextmanager
def recorded(root: Path) -> Iterator[list[Moment]]:
    """The moments of what is done to a folder within a `with`; at first all that is in it is synced."""
    if not hasattr(_hook, "added"):
        sys.addaudithook(_hook)
        _hook.added = True  # for good: hooks can't be taken away
    recorder = Recorder(root)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", recorder.fsync)
        _listeners.append(recorder)
        try:
            yield recorder.moments
        finally:
            _listeners.remove(recorder)
    recorder.note("the end")


def states(moments: list[Moment]) -> Iterator[tuple[str, State]]:
    """All different states after a power loss at any of the moments, each with the words for it."""
    known: set[int] = set()
    for at, moment in enumerate(moments):
        for content, names in VARIANTS:
            state = moment.after_power_loss(content, names, f"{at} {content}")
            if state.key not in known:
                known.add(state.key)
                yield f"before {moment.change} ({at} of {len(moments)}): {content}, {names}", state
