"""A finished dataset copied to a remote folder, from where `ShardedDataset(..., remote=url)` reads it.

The manifest goes last, so the remote folder is a dataset when, and only when, all of it is there. A copy that was
stopped resumes where it was: files that the store has whole are not sent again.
"""

import shutil
import time
from pathlib import Path

from openlm_pipeline.errors import DataError, IdentityError, MissingInputError
from openlm_pipeline.result import Say
from openlm_pipeline.shards.manifest import (
    DATASET,
    DOCUMENTS,
    MANIFEST,
    QUARANTINE,
    QUARANTINE_SUM,
    read_manifest,
    read_version,
)
from openlm_pipeline.shards.store import FETCHED
from openlm_pipeline.storage.copies import describe_file, send
from openlm_pipeline.storage.files import sha256_file
from openlm_pipeline.storage.remote import download, holds, join, public, remote_size

_REPORT_SECONDS = 2.0


def publish(folder: Path, url: str, report: Say, *, delete_local: bool = False) -> None:
    """Copy the finished dataset in `folder` to the remote folder `url`.

    Args:
        delete_local: once all is there, delete the local shards, their sums and their provenance. What is beside all
            shards stays, so that the folder can be opened with `remote=url`.

    Raises:
        MissingInputError: there is no finished dataset in `folder`.
        IdentityError: `url` holds another finished dataset.
        DataError: a local file is damaged, or the store does not take a file whole.
        ConfigError: the store may not be written.
    """
    entries = {entry.tar: entry for entry in read_manifest(folder)}
    _refuse_another(folder, url)
    of_shards = [p for e in entries.values() for name in (e.sums, e.provenance) if (p := folder / name).exists()]
    beside = [p for name in (QUARANTINE, QUARANTINE_SUM, DOCUMENTS, DATASET, MANIFEST) if (p := folder / name).exists()]
    files = {name: {"bytes": e.bytes, "sha256": e.sha256} for name, e in entries.items()}
    files |= {path.name: describe_file(path) for path in [*of_shards, *beside]}
    reported = time.monotonic()

    def check(name: str) -> None:
        path, entry = folder / name, entries.get(name)
        if entry and not path.exists():
            raise DataError(
                f"shard {path} is missing though the manifest lists it, and it is not whole in {public(url)}"
            )
        if entry and sha256_file(path) != entry.sha256:
            raise DataError(
                f"shard {path} is damaged: its sha256 is not the manifest's. Make it again before publishing."
            )

    def told(done: int) -> None:
        nonlocal reported
        if time.monotonic() - reported >= _REPORT_SECONDS:
            reported = time.monotonic()
            report(f"publishing {folder.name}: {done} of {len(files) - 1} files are in {public(url)}")

    sent = send({name: folder / name for name in files}, url, files, [MANIFEST], before=check, after=told)
    report(f"published {len(entries)} shards in {public(url)}: {sent} files sent, {len(files) - sent} were there")
    if delete_local:
        for path in [*(folder / name for name in entries), *of_shards]:
            path.unlink(missing_ok=True)


def _refuse_another(folder: Path, url: str) -> None:
    there = join(url, MANIFEST)
    try:
        remote_size(there)
    except MissingInputError:
        return
    if holds(there, size=(folder / MANIFEST).stat().st_size, sha256=sha256_file(folder / MANIFEST)):
        return
    fetched = folder / FETCHED / "published"  # its store may hold it without a note of its hash
    download(there, fetched / MANIFEST)
    same = read_version(fetched) == read_version(folder)  # an earlier release wrote less into it
    shutil.rmtree(fetched)
    if not same:
        raise IdentityError(f"{public(url)} holds another finished dataset than {folder}; publish to another folder")
