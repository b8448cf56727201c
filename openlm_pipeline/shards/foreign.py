"""OpenLM's own shards as a dataset: each is converted to our format once, when it is needed, and then mapped.

OpenLM's folder holds `manifest.jsonl` with `shard` and `num_sequences` (or the older `num_chunks`), and tars of JSON
or text members; it may be local or any fsspec URL.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from openlm_pipeline.errors import DataError, IdentityError, MissingInputError
from openlm_pipeline.files import read_json, write_json
from openlm_pipeline.lineage.fingerprint import differences
from openlm_pipeline.remote import download, is_remote, join, open_remote, public, storage_errors
from openlm_pipeline.shards.dataset import DATASET, MANIFEST, ShardedDataset, ShardEntry
from openlm_pipeline.shards.format import SampleFormat, write_shard
from openlm_pipeline.shards.openlm_formats import read_shard
from openlm_pipeline.shards.store import FETCHED, ShardStore, only_one


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
    sample_format = SampleFormat.for_vocabulary(seq_len + 1, vocab_size)
    entries = _entries(manifest, where, sample_format)
    settings = {"seq_len": seq_len, "vocab_size": vocab_size, "eot_id": eot_id, "pad_id": pad_id}
    identity = {"manifest_sha256": hashlib.sha256(manifest).hexdigest(), **settings}
    version = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    samples = sum(e.num_sequences for e in entries)
    info: dict[str, Any] = {
        "name": public(where).rstrip("/").rsplit("/", 1)[-1],
        "tokenizer": {"name": None, "sha256": None, "vocab_size": vocab_size},
        "eot_id": eot_id,
        "pad_id": pad_id,
        "seq_len": seq_len,
        "dtype": sample_format.dtype,
        "totals": {"samples": samples, "tokens": samples * (seq_len + 1), "shards": len(entries)},
        "identity": identity,
    }
    _claim(cache, info)
    first = np.concatenate([[0], np.cumsum([e.num_sequences for e in entries])])

    def bring(k: int, path: Path) -> None:
        source, fetched = join(where, path.name), cache / FETCHED / f"{path.stem}.openlm.tar"
        if is_remote(where):
            download(source, fetched)
        try:
            local = fetched if is_remote(where) else Path(source)
            rows = read_shard(local, **settings, num_samples=entries[k].num_sequences)
        except DataError as e:
            raise DataError(f"shard {public(source)} can't be converted: {e}") from e
        finally:
            fetched.unlink(missing_ok=True)
        write_shard(path, rows, int(first[k]), sample_format)

    names, sizes = [f"{e.shard}.tar" for e in entries], [e.bytes for e in entries]
    store = ShardStore(cache, names, sizes, [None] * len(entries), bring)
    return ShardedDataset.over(cache, entries, info, version, store)


def _read_manifest(where: str) -> bytes:
    url = join(where, MANIFEST)
    try:
        with open_remote(url) as file, storage_errors(public(url), "can't be read"):
            return file.read()
    except MissingInputError as e:
        raise MissingInputError(f"there are no shards of OpenLM in {public(where)}: it has no {MANIFEST}") from e


def _entries(manifest: bytes, where: str, sample_format: SampleFormat) -> list[ShardEntry]:
    entries = []
    for number, line in enumerate(manifest.splitlines(), 1):
        try:
            fields = json.loads(line)
            count = fields["num_sequences"] if "num_sequences" in fields else fields["num_chunks"]
            shard = fields["shard"]
            if not (isinstance(shard, str) and isinstance(count, int) and count >= 0):
                raise TypeError("`shard` is a string, and its number of samples a whole number")
        except (ValueError, TypeError, KeyError) as e:
            raise DataError(f"{public(join(where, MANIFEST))}, line {number} is not a manifest entry: {e}") from e
        nbytes = sample_format.shard_bytes(count)
        entries.append(ShardEntry(shard, count, nbytes, "", count * sample_format.sample_tokens, "openlm"))
    return entries


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
