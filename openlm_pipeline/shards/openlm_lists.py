"""OpenLM's `--train-data` as a dataset: tars named one by one or with braces, without a manifest, or a manifest file.

`shard-{0000..0099}.tar` stands for a hundred tars, `::` stands between patterns, and any of them may be an fsspec URL.
How many samples a tar has is taken from `sizes.json` or `manifest.jsonl` beside it, and is else counted once and noted
in the cache.
"""

import json
import tarfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import bracex

from openlm_pipeline.errors import ConfigError, DataError, MissingInputError
from openlm_pipeline.shards.dataset import ShardedDataset
from openlm_pipeline.shards.foreign import foreign_dataset, manifest_counts
from openlm_pipeline.shards.manifest import MANIFEST
from openlm_pipeline.shards.store import only_one
from openlm_pipeline.storage.files import read_json, write_json
from openlm_pipeline.storage.home import Home
from openlm_pipeline.storage.remote import join, open_remote, public, storage_errors

EOT_ID = 0
"""What OpenLM's readers take for `<|endoftext|>`: its id in the GPT-NeoX-20B tokenizer, the only one OpenLM used."""

PIPE = "pipe:"
"""What webdataset takes for a shell command."""

_MAX_SHARDS = 1_000_000
_COUNTS = "counts.json"
_SIZES = "sizes.json"
_THREADS = 8


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


def open_list(
    shards: str, home: Home, cache: Path, *, seq_len: int, vocab_size: int, eot_id: int = EOT_ID, pad_id: int | None
) -> ShardedDataset:
    """A dataset over listed tars, each converted to our format when it is needed.

    `version` is the sha256 of names, numbers of samples and the settings: it does not speak for the tars' content.

    Args:
        shards: what `is_list` takes.
        cache, seq_len, vocab_size, eot_id, pad_id: as for `open_foreign`.

    Raises:
        ConfigError: as `expand`; or tars and manifests together.
        MissingInputError: a tar or manifest is not there.
        DataError: a tar can't be read, or none has a sample.
        IdentityError: `cache` holds shards converted from something else.
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
    return foreign_dataset(
        public(shards),
        {f"{k:08d}": name for k, name in enumerate(names)},
        sizes,
        cache,
        {"shards": [public(name) for name in names], "num_samples": sizes},
        seq_len=seq_len,
        vocab_size=vocab_size,
        eot_id=eot_id,
        pad_id=pad_id,
    )


def first_member(name: str) -> str:
    """Name of the first file in a tar, for its extension: OpenLM's `--data-key`.

    Raises:
        MissingInputError, ConfigError, DataError: it can't be read, or holds nothing.
    """
    try:
        with open_remote(name, "shard") as file, tarfile.open(fileobj=file, mode="r:") as archive:
            for info in archive:
                if info.isreg():
                    return info.name
    except (tarfile.TarError, OSError, EOFError) as e:
        raise DataError(f"shard {public(name)} is not a whole tar archive: {e}") from e
    raise DataError(f"shard {public(name)} holds no samples")


def _counts(names: Sequence[str], cache: Path) -> list[int]:
    """Samples of each tar: as noted, as its folder says, or counted now."""
    keys = [public(name) for name in names]
    with only_one(cache, _COUNTS):  # so that one process of many counts
        noted: dict[str, int] = read_json(cache / _COUNTS) if (cache / _COUNTS).exists() else {}
        if missing := [name for name in names if public(name) not in noted]:
            folders = {name.rpartition("/")[0] for name in missing}
            known = {join(folder, tar): n for folder in folders for tar, n in _said_by(folder).items()}
            with ThreadPoolExecutor(_THREADS) as pool:
                found = pool.map(lambda name: known[name] if name in known else _count(name), missing)
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


def _count(name: str) -> int:
    try:
        with open_remote(name, "shard") as file, tarfile.open(fileobj=file, mode="r:") as archive:
            return sum(info.isreg() for info in archive)
    except (tarfile.TarError, OSError, EOFError) as e:
        raise DataError(f"shard {public(name)} is not a whole tar archive: {e}") from e
