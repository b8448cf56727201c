"""The fault matrix: each stage under each fault of a disk, a clock or what dead processes left.

A cell ends with the right result, or with one line that names cause and next step. The same command without the fault
then makes what an undisturbed one makes.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import random
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
from commands import Ended
from stages import LATER, Result, Stage, before, fsck, launch
from whole_home import make_whole_home

NEXT_STEP = re.compile(r"again|Free some|writable|Look at the disk|make sure|Check ")
SAMPLE = 1 / 8
"""Of the cells, in CI."""
SEED = os.environ.get("OPENLM_DRILL_SEED", "faults")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_whole_home(tmp_path_factory)


def _remount(disk: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", str(disk)], check=True)


@contextlib.contextmanager
def _mounted(disk: Path) -> Iterator[None]:
    """A file system in memory."""
    disk.mkdir(exist_ok=True)
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(disk)], capture_output=True, text=True
    )
    if made.returncode:
        pytest.skip(f"a file system can't be mounted here: {made.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)  # shards stay mapped


def full(kilobytes: int) -> Callable[[Path], AbstractContextManager[None]]:
    @contextlib.contextmanager
    def fault(disk: Path) -> Iterator[None]:
        free = os.statvfs(disk)
        (disk / "filler").write_bytes(bytes(free.f_bavail * free.f_frsize - kilobytes * 1024))
        yield
        (disk / "filler").unlink()

    return fault


@contextlib.contextmanager
def read_only(disk: Path) -> Iterator[None]:
    _remount(disk, "ro")
    yield
    _remount(disk, "rw")


def no_inodes(left: int) -> Callable[[Path], AbstractContextManager[None]]:
    @contextlib.contextmanager
    def fault(disk: Path) -> Iterator[None]:
        now = os.statvfs(disk)
        _remount(disk, f"nr_inodes={now.f_files - now.f_ffree + left}")
        yield
        _remount(disk, "nr_inodes=0")

    return fault


def syncing_fails(number: int, at: int) -> Callable[[Path], AbstractContextManager[None]]:
    """An error that shows as a file is synced, as those of quotas and of network file systems do."""

    @contextlib.contextmanager
    def fault(disk: Path) -> Iterator[None]:
        count = itertools.count()

        def fsync(descriptor: int) -> None:
            if disk in Path(f"/proc/self/fd/{descriptor}").readlink().parents and next(count) >= at:
                raise OSError(number, os.strerror(number))

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "fsync", fsync)
            yield

    return fault


_refused: list[Callable[[Path], None]] = []


def _hook(event: str, arguments: tuple) -> None:
    if _refused and event == "open" and isinstance(arguments[0], str | os.PathLike) and arguments[2] & os.O_CREAT:
        _refused[0](Path(os.fspath(arguments[0])))


def no_new_file(at: int) -> Callable[[Path], AbstractContextManager[None]]:
    """A quota that is reached: from some moment no more file can be made."""

    @contextlib.contextmanager
    def fault(disk: Path) -> Iterator[None]:
        if not hasattr(_hook, "added"):
            sys.addaudithook(_hook)
            _hook.added = True  # for good: hooks can't be taken away
        count = itertools.count()

        def refuse(path: Path) -> None:
            if disk in path.absolute().parents and not path.exists() and next(count) >= at:
                raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT), str(path))

        _refused.append(refuse)
        yield
        _refused.clear()

    return fault


@contextlib.contextmanager
def slow_syncing(disk: Path) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: time.sleep(0.02))
        yield


def clock_set(seconds: int) -> Callable[[Path], AbstractContextManager[None]]:
    """The clock is set while the stage is under way."""

    @contextlib.contextmanager
    def fault(disk: Path) -> Iterator[None]:
        right, count = time.time, itertools.count()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(time, "time", lambda: right() + (seconds if next(count) > 5 else 0))
            yield

    return fault


@contextlib.contextmanager
def stale_locks(disk: Path) -> Iterator[None]:
    """Locks that dead processes left, with the number of one that lives now, and of another host."""
    for number, folder in enumerate(p for p in (disk / "root" / "home").rglob("*") if p.is_dir()):
        (folder / ".lock").write_text(f"{os.getpid()}\nelsewhere\n" if number % 2 else "")
    yield


ON_A_DISK = {
    "full": full(0),
    "full after 40 kB": full(40),
    "full after 400 kB": full(400),
    "read-only": read_only,
    "no inodes": no_inodes(0),
    "no inodes after 6": no_inodes(6),
}
"""Faults of a file system, which reach every process."""
IN_THIS_PROCESS = {
    **{f"EIO at sync {at}": syncing_fails(errno.EIO, at) for at in (0, 3, 12, 40)},
    **{f"EDQUOT at sync {at}": syncing_fails(errno.EDQUOT, at) for at in (1, 7)},
    **{f"EDQUOT at new file {at}": no_new_file(at) for at in (0, 2, 8)},
    "slow syncing": slow_syncing,
    "clock an hour back": clock_set(-3600),
    "clock an hour ahead": clock_set(3600),
    "stale locks": stale_locks,
}
FAULTS = {**ON_A_DISK, **IN_THIS_PROCESS}
NO_ERROR = ("slow syncing", "clock an hour back", "clock an hour ahead", "stale locks")
CELLS = [(s, f) for s in LATER for f in FAULTS if not (s is launch and f in IN_THIS_PROCESS)]


def prepare(stage: Stage, whole: Path, root: Path) -> None:
    before(stage, whole, root)
    if stage is fsck:
        shard = root / "home" / "shards" / "web" / "v1" / "00000000.tar"
        shard.write_bytes(shard.read_bytes()[:-1000])


def attempt(stage: Stage, root: Path) -> tuple[Ended, Result]:
    try:
        return stage(root)
    except Exception as e:  # noqa: BLE001 - a traceback is what a cell must not end with
        return Ended(-1, "", f"{type(e).__name__}: {e}"), {}


def others(expected: Result, result: Result) -> list[str]:
    return sorted(name for name in {**expected, **result} if expected.get(name) != result.get(name))


def cell(stage: Stage, fault: str, whole: Path, disk: Path, expected: dict[Stage, tuple[int, Result]]) -> str | None:
    """What is wrong with a cell."""
    root = disk / "root"
    with _mounted(disk):
        if stage not in expected:
            prepare(stage, whole, root)
            ended, result = stage(root)
            assert ended.returncode == (4 if stage is fsck else 0), ended
            expected[stage] = ended.returncode, result
            shutil.rmtree(root)
        code, right = expected[stage]
        prepare(stage, whole, root)
        with FAULTS[fault](disk):
            ended, result = attempt(stage, root)
        if ended.returncode == code:
            if different := others(right, result):
                return f"SILENT: other {', '.join(different)}"
        elif fault in NO_ERROR or not _says_what_to_do(ended):
            return f"exit code {ended.returncode}: {ended.stderr}"
        again, result = attempt(stage, root)
        if again.returncode != code and not (stage is fsck and ended.returncode == code and not again.returncode):
            return f"then exit code {again.returncode}: {again.stderr}"
        return f"SILENT: then other {', '.join(o)}" if (o := others(right, result)) else None


def _says_what_to_do(ended: Ended) -> bool:
    lines = ended.stderr.splitlines()
    one = len(lines) == 1 or "--allow" in lines[-1]  # what a look ahead found has its way on in a line of its own
    return one and lines[0].startswith("error: ") and bool(NEXT_STEP.search(ended.stderr))


def wrong_cells(cells: list[tuple[Stage, str]], whole: Path, disk: Path) -> list[str]:
    expected: dict[Stage, tuple[int, Result]] = {}
    found = []
    for stage, fault in cells:
        if problem := cell(stage, fault, whole, disk, expected):
            found.append(f"{stage.__name__}, {fault}: {problem}")
    return found


def test_a_fault_is_named_and_the_same_command_goes_on(whole: Path, tmp_path: Path) -> None:
    """A sample of the cells, drawn by a seed."""
    some = random.Random(SEED).sample(CELLS, round(len(CELLS) * SAMPLE))
    wrong = wrong_cells(sorted(some, key=CELLS.index), whole, tmp_path / "disk")
    assert not wrong, "\n".join(wrong)


@pytest.mark.drill
def test_no_fault_is_silent(whole: Path, tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    wrong = wrong_cells(CELLS, whole, tmp_path / "disk")
    silent = sum("SILENT" in problem for problem in wrong)
    record_property("counted", f"{len(CELLS)} cells, {len(wrong)} wrong, {silent} of them silent")
    assert not wrong, "\n".join(wrong)
