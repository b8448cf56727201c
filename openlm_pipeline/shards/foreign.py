"""OpenLM's own shards as a dataset: each is converted to our format once, when it is needed, and then mapped.

OpenLM's folder holds `manifest.jsonl` with `shard` and `num_sequences` (or the older `num_chunks`), and tars of JSON
or text members; it may be local or any fsspec URL. Its `--train-data` names tars one by one or with braces, or a
manifest file: `shard-{0000..0099}.tar` stands for a hundred tars, `::` stands between patterns. How many samples such a
tar has is taken from `sizes.json` or `manifest.jsonl` beside it, and is else counted once and noted in the cache.
"""

import functools
import hashlib
import json
import tarfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bracex
import numpy as np

from openlm_pipeline.errors import ConfigError, DataError, IdentityError, MissingInputError
from openlm_pipeline.fingerprint import differences
from openlm_pipeline.shards.dataset import ShardedDataset
from openlm_pipeline.shards.format import SampleFormat, write_shard
from openlm_pipeline.shards.manifest import DATASET, MANIFEST, ShardEntry
from openlm_pipeline.shards.openlm_formats import first_length, read_shard
from openlm_pipeline.shards.store import FETCHED, ShardStore, only_one
from openlm_pipeline.storage.export_record import check_file, recorded_files
from openlm_pipeline.storage.files import check_inside, read_json, write_json
from openlm_pipeline.storage.home import Home
from openlm_pipeline.storage.remote import download, is_remote, join, open_remote, public, storage_errors

EOT_ID = 0
"""What OpenLM's readers take for `<|endoftext|>`: its id in the GPT-NeoX-20B tokenizer, the only one OpenLM used."""

PIPE = "pipe:"
"""What webdataset takes for a shell command."""

_MAX_SHARDS = 1_000_000
_PADDING = (1 << 31) - 1
"""An id that no tokenizer has, for the string `<|pad|>`."""
_COUNTS = "counts.json"
_SIZES = "sizes.json"
_THREADS = 8


def open_foreign(folder_or_url: str | Path, cache: Path, **settings: int | None) -> ShardedDataset:
    """A dataset over shards that OpenLM's tools made; errors as of `foreign_dataset`.

    `version` is the sha256 of the manifest and these settings; OpenLM's manifests hold no hashes of shards, so it does
    not speak for their content.

    Args:
        folder_or_url: where `manifest.jsonl` and the tars are.
        cache, settings: as for `foreign_dataset`.

    Raises:
        MissingInputError: there is no manifest.
        DataError: a line of the manifest is none.
    """
    where = str(folder_or_url)
    manifest = _read_manifest(where)
    counts = _parse_counts(manifest, join(where, MANIFEST))
    sources = {shard: join(where, f"{shard}.tar") for shard in counts}
    name, digest = public(where).rstrip("/").rsplit("/", 1)[-1], hashlib.sha256(manifest).hexdigest()
    return foreign_dataset(name, sources, list(counts.values()), cache, {"manifest_sha256": digest}, **settings)


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
    seq_len, recorded = next(lengths, 2) - 1, recorded_files(folder)
    for shard, path in paths.items():
        problem = None
        try:
            if not path.exists():
                raise DataError(f"shard {path} is missing though the manifest lists it")
            if not quick:
                check_file(path, recorded.get(path.name))
                read_shard(path, seq_len=seq_len, vocab_size=1 << 31, eot_id=0, pad_id=0, num_samples=counts[shard])
        except DataError as e:
            problem = str(e)
        yield path.name, problem


@dataclass(frozen=True)
class ForeignStats:
    """Numbers of OpenLM's shards in a folder; what its manifest does not say is counted."""

    shards: int
    samples: int
    sample_tokens: int
    bytes: int
    ends: int
    """End-of-text tokens: about as many documents end."""
    padding: int
    largest_id: int


def _foreign_shards(folder: Path, eot_id: int) -> Iterator[tuple[Path, np.ndarray]]:
    """Each tar of OpenLM's in a folder, and its samples as uint32[n, seq_len + 1], padding as `_PADDING`."""
    counts = _parse_counts(_read_manifest(str(folder)), str(folder / MANIFEST))
    paths = {shard: folder / f"{shard}.tar" for shard in counts}
    for path in paths.values():
        if not path.exists():
            raise MissingInputError(f"shard {path} is missing though the manifest lists it")
    seq_len = next((length for path in paths.values() if (length := first_length(path))), 2) - 1
    settings = {"seq_len": seq_len, "vocab_size": _PADDING + 1, "eot_id": eot_id, "pad_id": _PADDING}
    for shard, path in paths.items():
        yield path, read_shard(path, **settings, num_samples=counts[shard])


def foreign_stats(folder: Path, eot_id: int = EOT_ID) -> ForeignStats:
    """Count OpenLM's shards; a shard is in memory at a time.

    Raises:
        MissingInputError: there is no manifest, or a tar is not there.
        DataError: one is damaged.
    """
    shards = samples = width = size = ends = padding = largest = 0
    for path, ids in _foreign_shards(folder, eot_id):
        shards, samples, width, size = shards + 1, samples + len(ids), ids.shape[1], size + path.stat().st_size
        ends += int((ids == eot_id).sum())
        padding += int((ids == _PADDING).sum())
        largest = max(largest, int(ids[ids != _PADDING].max(initial=0)))
    return ForeignStats(shards, samples, width, size, ends, padding, largest)


def foreign_sample(folder: Path, number: int, eot_id: int = EOT_ID) -> list[np.ndarray]:
    """The documents that a sample of OpenLM's is made of, as ids, each with its end-of-text; padding left out.

    Raises:
        ConfigError: there is no such sample.
        MissingInputError, DataError: as for `foreign_stats`.
    """
    first = 0
    for _, ids in _foreign_shards(folder, eot_id):
        if number < first + len(ids):
            sample = ids[number - first]
            sample = sample[sample != _PADDING]
            cuts = np.flatnonzero(sample == eot_id) + 1
            return [part for part in np.split(sample, cuts) if len(part)]
        first += len(ids)
    raise ConfigError(f"{folder} has samples 0 to {first - 1}, and no sample {number}")


def foreign_dataset(
    name: str,
    sources: dict[str, str],
    num_samples: Sequence[int],
    cache: Path,
    origin: dict[str, Any],
    *,
    seq_len: int,
    vocab_size: int,
    eot_id: int,
    pad_id: int | None = None,
) -> ShardedDataset:
    """A dataset over OpenLM's tars whose numbers of samples are known.

    Args:
        sources: path or URL of each tar, by the name of the shard that it becomes in `cache`.
        num_samples: of each.
        cache: local folder for the converted shards, of this dataset alone.
        origin: what identifies the tars.
        seq_len: tokens of a sample less one.
        vocab_size: ids that the tokenizer has.
        eot_id, pad_id: of the tokenizer, for what OpenLM writes instead of them.

    Raises:
        DataError: there is no sample; later, a shard is damaged or has another number of them.
        IdentityError: `cache` holds shards converted from something else.
    """
    if not sum(num_samples):
        raise DataError(f"there is not one sample in {name}")
    settings = {"seq_len": seq_len, "vocab_size": vocab_size, "eot_id": eot_id, "pad_id": pad_id}
    sample_format = SampleFormat.for_vocabulary(seq_len + 1, vocab_size)
    entries = [
        ShardEntry(shard, n, sample_format.shard_bytes(n), "", n * sample_format.sample_tokens, "openlm")
        for shard, n in zip(sources, num_samples)
    ]
    urls = list(sources.values())
    identity = {**origin, **settings}
    version = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    samples = sum(num_samples)
    info: dict[str, Any] = {
        "name": name,
        "tokenizer": {"name": None, "sha256": None, "vocab_size": vocab_size},
        "eot_id": eot_id,
        "pad_id": pad_id,
        "seq_len": seq_len,
        "dtype": sample_format.dtype,
        "totals": {"samples": samples, "tokens": samples * (seq_len + 1), "shards": len(entries)},
        "identity": identity,
    }
    _claim(cache, info)
    first, recorded = np.concatenate([[0], np.cumsum(num_samples)]), functools.cache(recorded_files)

    def bring(k: int, path: Path) -> None:
        source, fetched = urls[k], cache / FETCHED / f"{path.stem}.openlm.tar"
        if is_remote(source):
            download(source, fetched)
        try:
            local = fetched if is_remote(source) else Path(source)
            check_file(local, recorded(local.parent).get(local.name))
            rows = read_shard(local, **settings, num_samples=entries[k].num_sequences)
        except DataError as e:
            raise DataError(f"shard {public(source)} can't be converted: {e}") from e
        finally:
            fetched.unlink(missing_ok=True)
        write_shard(path, rows, int(first[k]), sample_format)

    names, sizes = [f"{e.shard}.tar" for e in entries], [e.bytes for e in entries]
    store = ShardStore(cache, names, sizes, [None] * len(entries), bring)
    return ShardedDataset(cache, made=(entries, info, version, store))


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
        if not is_remote(where):
            check_file(Path(where) / MANIFEST, recorded_files(Path(where)).get(MANIFEST))
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
        check_inside([shard], f"{public(url)}, line {number},")
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


def is_list(shards: str) -> bool:
    """Whether a source's `shards` names tars or a manifest file, and not a folder."""
    return "::" in shards or "{" in shards or shards.endswith((".tar", ".jsonl")) or shards.startswith(PIPE)


def expand(shards: str, home: Home) -> list[str]:
    """The paths and URLs that patterns with `::` and braces stand for, in order; relative ones start at `home`.

    Raises:
        ConfigError: a pipe, too many names, or one name twice.
    """
    found: list[str] = []
    for pattern in shards.split("::"):
        if pattern.startswith(PIPE):
            raise ConfigError(
                f"{public(pattern)} is a shell command, and none is run for data. Give the URL itself, such as "
                "s3://bucket/shard-{0000..0099}.tar, which is read without one"
            )
        try:
            found += [home.resolve(name) for name in bracex.expand(pattern, limit=_MAX_SHARDS)]
        except bracex.ExpansionLimitException:
            raise ConfigError(f"{public(pattern)} stands for more than {_MAX_SHARDS:,} shards") from None
    if len(set(found)) < len(found):
        twice = next(name for name in found if found.count(name) > 1)
        raise ConfigError(f"shard {public(twice)} is named twice")
    return found


def open_list(shards: str, home: Home, cache: Path, **settings: int | None) -> ShardedDataset:
    """A dataset over listed tars, each converted to our format when it is needed.

    `version` is the sha256 of names, numbers of samples and the settings: it does not speak for the tars' content.

    Args:
        shards: what `is_list` takes.
        cache, settings: as for `foreign_dataset`, whose errors it raises too.

    Raises:
        ConfigError: as `expand`; or tars and manifests together.
        MissingInputError: a tar or manifest is not there.
        DataError: a tar can't be read.
    """
    names = expand(shards, home)
    if any(name.endswith(".jsonl") for name in names):
        if len(names) > 1:
            raise ConfigError(f"a source is one manifest, or tars, but {public(shards)} names {len(names)} files")
        folder = names[0].rpartition("/")[0]
        counts = manifest_counts(names[0])
        names = [join(folder, f"{shard}.tar") for shard in counts]
        sizes = list(counts.values())
    else:
        sizes = _counts(names, cache)
    sources = {f"{k:08d}": name for k, name in enumerate(names)}
    origin = {"shards": [public(name) for name in names], "num_samples": sizes}
    return foreign_dataset(public(shards), sources, sizes, cache, origin, **settings)


def first_member(name: str) -> str:
    """Name of the first file in a tar, for its extension: OpenLM's `--data-key`.

    Raises:
        MissingInputError, ConfigError, DataError: it can't be read, or holds nothing.
    """
    if (first := next(_members(name), None)) is None:
        raise DataError(f"shard {public(name)} holds no samples")
    return first


def _members(name: str) -> Iterator[str]:
    """Names of the files in a tar."""
    try:
        with open_remote(name, "shard") as file, tarfile.open(fileobj=file, mode="r:") as archive:
            for info in archive:
                if info.isreg():
                    yield info.name
    except (tarfile.TarError, OSError, EOFError) as e:
        raise DataError(f"shard {public(name)} is not a whole tar archive: {e}") from e


def _counts(names: Sequence[str], cache: Path) -> list[int]:
    """Samples of each tar: as noted, as its folder says, or counted now."""
    keys = [public(name) for name in names]
    with only_one(cache, _COUNTS):  # so that one process of many counts
        noted: dict[str, int] = read_json(cache / _COUNTS) if (cache / _COUNTS).exists() else {}
        if missing := [name for name in names if public(name) not in noted]:
            folders = {name.rpartition("/")[0] for name in missing}
            known = {join(folder, tar): n for folder in folders for tar, n in _said_by(folder).items()}
            with ThreadPoolExecutor(_THREADS) as pool:
                found = pool.map(lambda name: known[name] if name in known else sum(1 for _ in _members(name)), missing)
                noted |= dict(zip(map(public, missing), found))
            write_json(cache / _COUNTS, noted)
    return [noted[key] for key in keys]


def _said_by(folder: str) -> dict[str, int]:
    """Samples of the tars in a folder, as far as its `manifest.jsonl` or webdataset's `sizes.json` says."""
    try:
        return {f"{shard}.tar": n for shard, n in manifest_counts(join(folder, MANIFEST)).items()}
    except MissingInputError:
        pass  # most lists have none
    url = join(folder, _SIZES)
    try:
        with open_remote(url) as file, storage_errors(public(url), "can't be read"):
            sizes = json.load(file)
    except MissingInputError:
        return {}
    if not isinstance(sizes, dict) or not all(isinstance(n, int) for n in sizes.values()):
        raise DataError(f"{public(url)} is not a JSON object of tar names and their numbers of samples")
    return sizes
