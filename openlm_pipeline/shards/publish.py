"""A finished dataset copied to a remote folder, from where `ShardedDataset(..., remote=url)` reads it.

The manifest goes last, so the remote folder is a dataset when, and only when, all of it is there. A copy that was
stopped goes on where it was: files that the store has whole are not sent again.
"""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from openlm_pipeline.errors import DataError, IdentityError, MissingInputError
from openlm_pipeline.files import sha256_file
from openlm_pipeline.remote import download, holds, join, public, remote_size, upload
from openlm_pipeline.result import Report
from openlm_pipeline.shards.dataset import DATASET, MANIFEST, QUARANTINE, ShardEntry, read_manifest
from openlm_pipeline.shards.store import FETCHED

_THREADS = 4
_REPORT_SECONDS = 2.0


def publish(folder: Path, url: str, report: Report, *, delete_local: bool = False) -> None:
    """Copy the finished dataset in `folder` to the remote folder `url`.

    Args:
        delete_local: once all is there, delete the local shards and their provenance. Manifest and `dataset.json`
            stay, so that the folder can be opened with `remote=url`.

    Raises:
        MissingInputError: there is no finished dataset in `folder`.
        IdentityError: `url` holds another finished dataset.
        DataError: a local file is damaged, or the store does not take a file whole.
        ConfigError: the store may not be written.
    """
    entries = read_manifest(folder)
    _refuse_another(folder, url)
    shards: list[Path] = [folder / f"{e.shard}.tar" for e in entries]
    provenance = [p for e in entries if (p := folder / f"{e.shard}.provenance.parquet").exists()]
    beside = [p for p in (folder / QUARANTINE, folder / DATASET) if p.exists()]
    calls: list[tuple[Callable[..., bool], tuple[object, ...]]] = [
        *((_publish_shard, (path, url, entry)) for path, entry in zip(shards, entries)),
        *((_publish_file, (path, url)) for path in [*provenance, *beside]),
    ]
    sent = done = 0
    reported = time.monotonic()
    with ThreadPoolExecutor(_THREADS, thread_name_prefix="publish") as pool:
        futures = [pool.submit(function, *args) for function, args in calls]
        try:
            for future in as_completed(futures):
                sent += future.result()
                done += 1
                if time.monotonic() - reported >= _REPORT_SECONDS:
                    reported = time.monotonic()
                    report(f"publishing {folder.name}: {done} of {len(calls)} files are in {public(url)}")
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    sent += _publish_file(folder / MANIFEST, url)
    report(f"published {len(shards)} shards in {public(url)}: {sent} files sent, {len(calls) + 1 - sent} were there")
    if delete_local:
        for path in [*shards, *provenance]:
            path.unlink(missing_ok=True)


def _refuse_another(folder: Path, url: str) -> None:
    there = join(url, MANIFEST)
    try:
        remote_size(there)
    except MissingInputError:
        return
    if holds(there, size=(folder / MANIFEST).stat().st_size, sha256=sha256_file(folder / MANIFEST)):
        return
    fetched = folder / FETCHED / "published.jsonl"  # its store may hold it without a note of its hash
    download(there, fetched)
    same = fetched.read_bytes() == (folder / MANIFEST).read_bytes()
    fetched.unlink()
    if not same:
        raise IdentityError(f"{public(url)} holds another finished dataset than {folder}; publish to another folder")


def _publish_shard(path: Path, url: str, entry: ShardEntry) -> bool:
    target = join(url, path.name)
    if holds(target, size=entry.bytes, sha256=entry.sha256):
        return False
    if not path.exists():
        raise DataError(f"shard {path} is missing though the manifest lists it, and it is not whole in {public(url)}")
    if sha256_file(path) != entry.sha256:
        raise DataError(f"shard {path} is damaged: its sha256 is not the manifest's. Make it again before publishing.")
    upload(path, target)
    return True


def _publish_file(path: Path, url: str) -> bool:
    target = join(url, path.name)
    if holds(target, size=path.stat().st_size, sha256=sha256_file(path)):
        return False
    upload(path, target)
    return True
