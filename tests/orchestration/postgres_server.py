"""A real PostgreSQL server of its own for a test: in a temporary folder, on a port of this machine that was free."""

import os
import secrets
import shutil
import socket
import subprocess
import tempfile
from pathlib import Path

USER, DATABASE = "dagster", "dagster"


def programs() -> Path | None:
    """The folder of the newest PostgreSQL server's programs, if one is installed."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda p: float(p.parent.name))
    if found:
        return found[-1]
    pg_ctl = shutil.which("pg_ctl")
    return Path(pg_ctl).resolve().parent if pg_ctl else None


class PostgresServer:
    """The server, running from its creation until `close`."""

    def __init__(self, bin_folder: Path) -> None:
        self._bin = bin_folder
        # PostgreSQL refuses to run as root, and no other user may enter pytest's folders.
        self._user = "postgres" if os.geteuid() == 0 else None
        self.folder = Path(tempfile.mkdtemp(prefix="postgres-"))
        self.password = secrets.token_hex(16)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        password_file = self.folder / "password"
        password_file.write_text(self.password)
        if self._user:
            for path in (self.folder, password_file):
                shutil.chown(path, self._user)
        self._run(
            "initdb", f"--pgdata={self.folder / 'data'}", f"--username={USER}", f"--pwfile={password_file}",
            "--auth=scram-sha-256", "--encoding=UTF8", "--locale=C", "--no-sync",
        )  # fmt: skip
        self.start()
        self._run("createdb", *self._client, DATABASE)

    @property
    def variables(self) -> dict[str, str]:
        """The environment that `deploy/dagster-postgres.yaml` reads."""
        return {
            "DAGSTER_POSTGRES_USER": USER,
            "DAGSTER_POSTGRES_PASSWORD": self.password,
            "DAGSTER_POSTGRES_HOST": "127.0.0.1",
            "DAGSTER_POSTGRES_PORT": str(self.port),
            "DAGSTER_POSTGRES_DB": DATABASE,
        }

    def start(self) -> None:
        options = f"-c listen_addresses=127.0.0.1 -c port={self.port} -c unix_socket_directories= -c fsync=off"
        self._run("pg_ctl", *self._data, "start", "--wait", f"--log={self.folder / 'log'}", f"--options={options}")

    def crash(self) -> None:
        """End it at once, as a crash would, with all connections cut."""
        self._run("pg_ctl", *self._data, "stop", "--wait", "--mode=immediate")

    def dump(self) -> Path:
        """A backup of the database, made while it is in use."""
        archive = self.folder / "dagster.dump"
        self._run("pg_dump", *self._client, "--format=custom", f"--file={archive}", DATABASE)
        return archive

    def restore(self, archive: Path) -> None:
        """Drop the database and make it anew from a backup."""
        self._run("dropdb", *self._client, "--force", DATABASE)
        self._run("createdb", *self._client, DATABASE)
        self._run("pg_restore", *self._client, "--exit-on-error", f"--dbname={DATABASE}", str(archive))

    def close(self) -> None:
        if (self.folder / "data" / "postmaster.pid").exists():
            self.crash()
        shutil.rmtree(self.folder)

    @property
    def _client(self) -> tuple[str, ...]:
        return ("--host=127.0.0.1", f"--port={self.port}", f"--username={USER}")

    @property
    def _data(self) -> tuple[str, ...]:
        return ("--silent", f"--pgdata={self.folder / 'data'}")

    def _run(self, program: str, *arguments: str) -> None:
        subprocess.run(
            [str(self._bin / program), *arguments],
            user=self._user, group=self._user, extra_groups=[] if self._user else None, cwd=self.folder,
            env={"PATH": os.environ["PATH"], "PGPASSWORD": self.password, "LC_ALL": "C"},
            stdout=subprocess.DEVNULL, check=True,
        )  # fmt: skip
