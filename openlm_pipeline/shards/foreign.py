"""OpenLM's own shards as a dataset: each is converted to our format once, when it is needed, and then mapped.

OpenLM's folder holds `manifest.jsonl` with `shard` and `num_sequences` (or the older `num_chunks`), and tars of JSON
or text members; it may be local or any fsspec URL.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from openlm_pipeline.errors import DataError, IdentityError, MissingInputError
from openlm_pipeline.fingerprint import differences
from openlm_pipeline.shards.dataset import ShardedDataset
from openlm_pipeline.shards.format import SampleFormat, write_shard
from openlm_pipeline.shards.manifest import DATASET, MANIFEST, ShardEntry
from openlm_pipeline.shards.openlm_formats import first_length, read_shard
from openlm_pipeline.shards.store import FETCHED, ShardStore, only_one
from openlm_pipeline.storage.files import read_json, write_json
from openlm_pipeline.storage.remote import download, is_remote, join, open_remote, public, storage_errors


def open_foreign(
    folder_or_url: str | Path, cache: Path, *, seq_len: int, vocab_size: int, eot_id: int, pad_id: int | None = None
) -> ShardedDataset:
    """A dataset over shards that OpenLM's tools made.

    `version` is the sha256 of the manifest and these settings; OpenLM's manifests hold no hashes of shards, so it does
    not speak for their content.

    Args:
        folder_or_url: where `manifest.jsonl` and the tars are.
        cache: local folder for the converted shards, of this dataset alone.
        seq_len: tokens of a sample less one.
        vocab_size: ids that the tokenizer has.
        eot_id, pad_id: of the tokenizer, for what OpenLM writes instead of them.

    Raises:
        MissingInputError: there is no manifest.
        DataError: a line of the manifest is none; later, a shard is damaged or has another number of samples.
        IdentityError: `cache` holds shards converted from something else.
    """
    where = str(folder_or_url)
    manifest = _read_manifest(where)
    counts = _parse_counts(manifest, join(where, MANIFEST))
    return foreign_dataset(
        public(where).rstrip("/").rsplit("/", 1)[-1],
        {shard: join(where, f"{shard}.tar") for shard in counts},
        list(counts.values()),
        cache,
        {"manifest_sha256": hashlib.sha256(manifest).hexdigest()},
        seq_len=seq_len,
        vocab_size=vocab_size,
        eot_id=eot_id,
        pad_id=pad_id,
    )


def check_foreign(folder: Path, *, quick: bool = False) -> Iterator[tuple[str, str | None]]:
    """Check OpenLM's shards in a folder; yields (a tar's file name, what is wrong with it or None) in their order.

    OpenLM's manifest holds no hashes: each tar must be whole, hold as many samples as it says, and each sample must be
    a list of ids, as many as the first sample of the folder has.

    Args:
        quick: only that each tar is there.

    Raises:
        MissingInputError: there is no manifest.
        DataError: a line of it is no manifest entry.
    """
    counts = _parse_counts(_read_manifest(str(folder)), str(folder / MANIFEST))
    paths = {shard: folder / f"{shard}.tar" for shard in counts}
    lengths = (length for path in paths.values() if path.exists() and (length := first_length(path)))
    seq_len = next(lengths, 2) - 1
    for shard, path in paths.items():
        problem = None
        try:
            if not path.exists():
                raise DataError(f"shard {path} is missing though the manifest lists it")
            if not quick:
                read_shard(path, seq_len=seq_len, vocab_size=1 << 31, eot_id=0, pad_id=0, num_samples=counts[shard])
        except DataError as e:
            problem = str(e)
        yield path.name, problem


def foreign_dataset(
    name: str,
    sources: dict[str, str],
    num_samples: Sequence[int],
    cache: Path,
    origin: dict[str, Any],
    **settings: int | None,
) -> ShardedDataset:
    """A dataset over OpenLM's tars whose numbers of samples are known.

    Args:
        sources: path or URL of each tar, by the name of the shard that it becomes in `cache`.
        num_samples: of each.
        origin: what identifies the tars.
        settings: `seq_len`, `vocab_size`, `eot_id` and `pad_id`, as for `open_foreign`.

    Raises:
        DataError: there is no sample; later, a shard is damaged or has another number of them.
        IdentityError: `cache` holds shards converted from something else.
    """
    if not sum(num_samples):
        raise DataError(f"there is not one sample in {name}")
    sample_format = SampleFormat.for_vocabulary(settings["seq_len"] + 1, settings["vocab_size"])
    entries = [
        ShardEntry(shard, n, sample_format.shard_bytes(n), "", n * sample_format.sample_tokens, "openlm")
        for shard, n in zip(sources, num_samples)
    ]
    urls = list(sources.values())
    identity = {**origin, **settings}
    version = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    samples = sum(e.num_sequences for e in entries)
    info: dict[str, Any] = {
        "name": name,
        "tokenizer": {"name": None, "sha256": None, "vocab_size": settings["vocab_size"]},
        "eot_id": settings["eot_id"],
        "pad_id": settings["pad_id"],
        "seq_len": settings["seq_len"],
        "dtype": sample_format.dtype,
        "totals": {"samples": samples, "tokens": samples * (settings["seq_len"] + 1), "shards": len(entries)},
        "identity": identity,
    }
    _claim(cache, info)
    first = np.concatenate([[0], np.cumsum([e.num_sequences for e in entries])])

    def bring(k: int, path: Path) -> None:
        source, fetched = urls[k], cache / FETCHED / f"{path.stem}.openlm.tar"
        if is_remote(source):
            download(source, fetched)
        try:
            local = fetched if is_remote(source) else Path(source)
            rows = read_shard(local, **settings, num_samples=entries[k].num_sequences)
        except DataError as e:
            raise DataError(f"shard {public(source)} can't be converted: {e}") from e
        finally:
            fetched.unlink(missing_ok=True)
        write_shard(path, rows, int(first[k]), sample_format)

    names, sizes = [f"{e.shard}.tar" for e in entries], [e.bytes for e in entries]
    store = ShardStore(cache, names, sizes, [None] * len(entries), bring)
    return ShardedDataset.over(cache, entries, info, version, store)


def manifest_counts(url: str) -> dict[str, int]:
    """Shard -> number of samples, as a manifest of OpenLM's says, in its order.

    Raises:
        MissingInputError: there is no such file.
        DataError: a line of it is no manifest entry, or a shard has two.
    """
    return _parse_counts(_read(url), url)


def _read(url: str) -> bytes:
    with open_remote(url) as file, storage_errors(public(url), "can't be read"):
        return file.read()


def _read_manifest(where: str) -> bytes:
    try:
        return _read(join(where, MANIFEST))
    except MissingInputError as e:
        raise MissingInputError(f"there are no shards of OpenLM in {public(where)}: it has no {MANIFEST}") from e


def _parse_counts(manifest: bytes, url: str) -> dict[str, int]:
    counts: dict[str, int] = {}
    for number, line in enumerate(manifest.splitlines(), 1):
        try:
            fields = json.loads(line)
            count = fields["num_sequences"] if "num_sequences" in fields else fields["num_chunks"]
            shard = fields["shard"]
            if not (isinstance(shard, str) and isinstance(count, int) and count >= 0):
                raise TypeError("`shard` is a string, and its number of samples a whole number")
            if shard in counts:
                raise ValueError(f"shard {shard} has a line before it")
        except (ValueError, TypeError, KeyError) as e:
            raise DataError(f"{public(url)}, line {number} is not a manifest entry: {e}") from e
        counts[shard] = count
    return counts


def _claim(cache: Path, info: dict[str, Any]) -> None:
    """Make the cache this dataset's."""
    about = cache / DATASET
    with only_one(cache, DATASET):
        if not about.exists():
            write_json(about, info)
            return
    if changed := differences(read_json(about)["identity"], info["identity"]):
        raise IdentityError(
            f"{cache} holds shards converted from something else: {'; '.join(changed)}. Remove it, or name another."
        )
