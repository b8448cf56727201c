"""Hashes of large files, each made once per machine: known by size and time of change.

They are kept in `openlm_pipeline/file_hashes.jsonl` of the user's cache folder. Where that can't be written, each
process hashes for itself.
"""

import contextlib
import os
from pathlib import Path

import orjson

from openlm_pipeline.storage.files import sha256_file


class FileHashes:
    """The files that this machine hashed."""

    def __init__(self) -> None:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        self._path = cache / "openlm_pipeline" / "file_hashes.jsonl"
        self._known: dict[tuple[str, int, int], str] = {}
        with contextlib.suppress(OSError):  # as below
            for line in self._path.read_bytes().splitlines():
                with contextlib.suppress(orjson.JSONDecodeError):  # a line that a full disk cut
                    *file, sha256 = orjson.loads(line)
                    self._known[tuple(file)] = sha256

    def sha256(self, path: Path) -> str:
        """`sha256_file`, unless that was done here since the file changed."""
        about = path.stat()
        file = (str(path.absolute()), about.st_size, about.st_mtime_ns)
        if file not in self._known:
            self._known[file] = sha256_file(path)
            with contextlib.suppress(OSError):  # it is hashed again, by another process
                self._path.parent.mkdir(parents=True, exist_ok=True)
                with self._path.open("ab") as f:
                    f.write(orjson.dumps((*file, self._known[file])) + b"\n")
        return self._known[file]
