"""What a folder of downloads holds beside the files themselves.

NAME.part is what of NAME is there so far, and NAME.part.json says of which version of which URL it is. `downloads.json`
records source, size and hash of every file that is whole; SHA256SUMS holds the same hashes for `sha256sum -c`. Both are
written before a file gets its name, so a file without a record came from elsewhere.
"""

import threading
from pathlib import Path

from pydantic import ValidationError

from openlm_pipeline.corpus.checksums import parse_line
from openlm_pipeline.corpus.download_sources import RemoteFile
from openlm_pipeline.errors import DataError
from openlm_pipeline.storage.files import TMP_SUFFIX, write_json, write_text
from openlm_pipeline.strict import Strict, explain

RECORD_NAME = "downloads.json"
SUMS_NAME = "SHA256SUMS"
PART_SUFFIX = ".part"
_VERSION_SUFFIX = ".part.json"


def is_taken(name: str) -> bool:
    """Whether the folder's own files may have this name."""
    return name in (RECORD_NAME, SUMS_NAME) or name.endswith((PART_SUFFIX, _VERSION_SUFFIX, TMP_SUFFIX))


def local_state(folder: Path, name: str) -> tuple[str, int]:
    """How much of a file is there: `there`, `part` or `missing`, and its bytes; nothing is checked."""
    for state, path in (("there", folder / name), ("part", folder / (name + PART_SUFFIX))):
        if path.is_file():
            return state, path.stat().st_size
    return "missing", 0


class _Record(Strict):
    files: dict[str, RemoteFile] = {}


class Ledger:
    """The records of a folder whose lock the process holds; its threads may share it."""

    def __init__(self, folder: Path) -> None:
        """Read what is there.

        Raises:
            ConfigError, DataError: `downloads.json` or SHA256SUMS is damaged.
        """
        self._record_path = folder / RECORD_NAME
        self._sums_path = folder / SUMS_NAME
        self._lock = threading.Lock()
        self.files: dict[str, RemoteFile] = {}
        self._sums: list[str] = []
        try:
            if self._record_path.exists():
                self.files = dict(_Record.model_validate_json(self._record_path.read_bytes()).files)
            if self._sums_path.exists():
                self._sums = self._sums_path.read_text().splitlines()
        except ValidationError as e:
            raise explain(e, str(self._record_path)) from e
        except UnicodeDecodeError as e:
            raise DataError(f"{self._sums_path} is not text: {e}") from e

    def add(self, name: str, entry: RemoteFile) -> None:
        """Record a whole file, on disk when this returns."""
        with self._lock:
            self.files[name] = entry
            write_json(self._record_path, _Record(files=dict(sorted(self.files.items()))).model_dump())
            # SHA256SUMS may be the publisher's own, with more files in it: their lines stay.
            others = [line for line in self._sums if not (c := parse_line(line)) or c.path not in self.files]
            ours = [f"{entry.sha256}  {name}" for name, entry in sorted(self.files.items())]
            write_text(self._sums_path, "\n".join([*others, *ours]) + "\n")


def recorded_downloads(folder: Path) -> dict[str, RemoteFile]:
    """What was brought to a folder whole, by name; for those who only look.

    Raises:
        ConfigError, DataError: `downloads.json` is damaged.
    """
    return Ledger(folder).files


class Part:
    """NAME.part and NAME.part.json."""

    def __init__(self, folder: Path, name: str) -> None:
        self.path = folder / (name + PART_SUFFIX)
        self._version_path = folder / (name + _VERSION_SUFFIX)

    def size(self) -> int:
        return self.path.stat().st_size if self.path.exists() else 0

    def version(self, source: str) -> RemoteFile | None:
        """What the part is of, if that is known and from `source`."""
        try:
            version = RemoteFile.model_validate_json(self._version_path.read_bytes())
        except (FileNotFoundError, ValidationError):
            return None
        return version if version.source == source else None

    def begin(self, remote: RemoteFile) -> None:
        # In this order, so that no bytes ever lie beside the description of another version.
        self.path.unlink(missing_ok=True)
        self.describe(remote)

    def describe(self, remote: RemoteFile) -> None:
        write_json(self._version_path, remote.model_dump())

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)
        self._version_path.unlink(missing_ok=True)
