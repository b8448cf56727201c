"""Files are whole or not there, and folders are set aside rather than lost."""

import hashlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from openlm_pipeline.errors import BusyError, DataError, MissingInputError
from openlm_pipeline.storage.files import atomic_writer, folder_lock, read_json, set_aside, sha256_file, write_json


@pytest.mark.parametrize("before", [None, b"old"])
def test_a_file_appears_only_when_it_is_whole(tmp_path: Path, before: bytes | None) -> None:
    path = tmp_path / "folder" / "file"
    if before:
        path.parent.mkdir()
        path.write_bytes(before)
    with atomic_writer(path) as f:
        f.write(b"new")
        f.flush()
        assert (path.read_bytes() if path.exists() else None) == before
    assert path.read_bytes() == b"new" and list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_while_writing_leaves_the_old_file_alone(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(error), atomic_writer(path) as f:
        f.write(b"half")
        raise error
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_a_process_killed_while_writing_leaves_the_old_file_alone(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    code = (
        "import os, signal, sys; from pathlib import Path; from openlm_pipeline.storage.files import atomic_writer\n"
        "with atomic_writer(Path(sys.argv[1])) as f:\n"
        "    f.write(b'half'); f.flush(); os.kill(os.getpid(), signal.SIGKILL)"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    ended = subprocess.run([sys.executable, "-c", code, str(path)], env=environment, check=False)
    assert ended.returncode == -signal.SIGKILL and path.read_bytes() == b"old"
    write_json(path, {"later": "writers are not in the way"})
    assert read_json(path) == {"later": "writers are not in the way"} and list(tmp_path.iterdir()) == [path]


def test_json_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(MissingInputError, match=rf"{tmp_path}/none\.json does not exist"):
        read_json(tmp_path / "none.json")
    for content in (b'{"cut": ', b"\xff", b""):
        (tmp_path / "bad.json").write_bytes(content)
        with pytest.raises(DataError, match=rf"{tmp_path}/bad\.json is not valid JSON"):
            read_json(tmp_path / "bad.json")


def test_the_hash_is_that_of_the_bytes(tmp_path: Path) -> None:
    data = bytes(range(256)) * 5000  # more than one block of reading
    (tmp_path / "file").write_bytes(data)
    assert sha256_file(tmp_path / "file") == hashlib.sha256(data).hexdigest()


def test_set_aside_takes_the_next_free_name(tmp_path: Path) -> None:
    for n in (1, 2):
        (tmp_path / "v1").mkdir()
        (tmp_path / "v1" / "what").write_text(str(n))
        assert set_aside(tmp_path / "v1") == tmp_path / f"v1.superseded-{n}"
    assert [p.read_text() for p in sorted(tmp_path.glob("*/what"))] == ["1", "2"]


def test_a_lock_is_held_once_and_then_free(tmp_path: Path) -> None:
    with (
        folder_lock(tmp_path / "folder", "packing"),
        pytest.raises(BusyError, match=rf"already packing in {tmp_path}/folder"),
        folder_lock(tmp_path / "folder", "packing"),
    ):
        raise AssertionError("two hold the lock")
    with pytest.raises(ZeroDivisionError), folder_lock(tmp_path / "folder", "packing"):
        raise ZeroDivisionError
    with folder_lock(tmp_path / "folder", "packing"):
        pass
