"""Copy a DAGSTER_HOME whose state is in SQLite, also while it is in use.

    python deploy/backup_sqlite.py DAGSTER_HOME COPY

Each database comes through SQLite's own backup: a plain copy of one in use may lack what is in its write-ahead log.
"""

import shutil
import sqlite3
import sys
from contextlib import closing
from pathlib import Path


def backup(home: Path, copy: Path) -> None:
    """Copy `home` to `copy`.

    Raises:
        SystemExit: there is no `home`, or there is a `copy` already.
    """
    if not (home / "dagster.yaml").is_file():
        raise SystemExit(f"error: {home} is no DAGSTER_HOME: it has no dagster.yaml")
    if copy.exists():
        raise SystemExit(f"error: {copy} is there already")
    for path in sorted(home.rglob("*")):
        target = copy / path.relative_to(home)
        if path.is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            if path.suffix == ".db":
                with closing(sqlite3.connect(path)) as source, closing(sqlite3.connect(target)) as made:
                    source.backup(made)
            elif not path.name.endswith((".db-wal", ".db-shm", ".db-journal")):
                shutil.copy2(path, target)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python deploy/backup_sqlite.py DAGSTER_HOME COPY")
    backup(Path(sys.argv[1]), Path(sys.argv[2]))
