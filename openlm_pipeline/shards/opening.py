"""Where the shards of a recipe's dataset are: made here, published to a store, or ready-made by someone else."""

import hashlib
from pathlib import Path

from openlm_pipeline.errors import ConfigError, DataError, MissingInputError
from openlm_pipeline.experiments import Dataset
from openlm_pipeline.shards.dataset import ShardedDataset
from openlm_pipeline.shards.extended import EXTENDS, ExtendedDataset
from openlm_pipeline.shards.foreign import EOT_ID, is_list, manifest_counts, open_foreign, open_list
from openlm_pipeline.shards.manifest import DATASET
from openlm_pipeline.shards.subset import FirstSamples, info_of_part
from openlm_pipeline.shards.synthetic import SCHEME, SyntheticDataset
from openlm_pipeline.storage.home import Home
from openlm_pipeline.storage.remote import is_remote, join, remote_size
from openlm_pipeline.tokenizers.tokenizer import read_tokenizer_info


def published_url(dataset: Dataset) -> str | None:
    """Where the dataset is copied to, if the recipe says so."""
    return join(join(dataset.shards_url, dataset.name), dataset.version) if dataset.shards_url else None


Opened = ShardedDataset | ExtendedDataset | FirstSamples | SyntheticDataset


def open_dataset(dataset: Dataset, home: Home, *, whole: bool = False) -> Opened:
    """The finished shards of a dataset, with those of the versions that it extends.

    Args:
        whole: also those past its `max_tokens`.

    Raises:
        MissingInputError: they are not there.
        ConfigError: they were made with another sequence length.
    """
    folder = home.shards(dataset.name, dataset.version)
    if dataset.source.shards is None:
        opened = ShardedDataset(folder, remote=published_url(dataset), cache_bytes=dataset.shard_cache_bytes)
        if extends := opened.info.get("identity", {}).get(EXTENDS):
            before = _of_version(dataset, extends["version"])
            home.pull(home.shards(before.name, before.version))
            opened = ExtendedDataset(open_dataset(before, home), opened)
    else:
        opened = _open_ready_made(dataset, dataset.source.shards, folder, home)
    if opened.info["seq_len"] != dataset.seq_len:
        raise ConfigError(f"{opened.folder} has samples of seq_len {opened.info['seq_len']}, not {dataset.seq_len}")
    most = None if whole else dataset.source.max_tokens
    if most and most // (dataset.seq_len + 1) < len(opened):
        if most <= dataset.seq_len or isinstance(opened, SyntheticDataset):
            raise ConfigError(f"{dataset.name}: max_tokens {most} is less than a sample, or of synthetic samples")
        return FirstSamples(opened, most // (dataset.seq_len + 1))
    return opened


def bring_and_open(dataset: Dataset, home: Home) -> Opened:
    """As `open_dataset`, where a home at a URL has the shards alone."""
    if not dataset.source.shards and not published_url(dataset):
        home.pull(home.shards(dataset.name, dataset.version))
    return open_dataset(dataset, home)


def segments_of(opened: Opened) -> list[tuple[ShardedDataset, int]]:
    """The datasets of shards that an opened one is made of, with the number of the first sample of each in it; none of
    synthetic samples."""
    whole = opened.whole if isinstance(opened, FirstSamples) else opened
    found, first = [], 0
    for segment in [] if isinstance(whole, SyntheticDataset) else whole.segments:
        found.append((segment, first))
        first += len(segment)
    return [(segment, first) for segment, first in found if first < len(opened)]


def open_extended(dataset: Dataset, home: Home) -> ShardedDataset | ExtendedDataset | None:
    """What a dataset extends, finished; None where it extends nothing.

    Raises:
        MissingInputError: that is not there.
    """
    if dataset.source.extends is None:
        return None
    home.pull(home.shards(dataset.name, dataset.source.extends))
    try:
        return open_dataset(_of_version(dataset, dataset.source.extends), home)
    except MissingInputError as e:
        raise MissingInputError(
            f"{dataset.name} {dataset.version} extends {dataset.source.extends}, which is not there: {e}"
        ) from e


def _of_version(dataset: Dataset, version: str) -> Dataset:
    source = dataset.source.model_copy(update={"version": version, "extends": None, "max_tokens": None})
    return dataset.model_copy(update={"source": source})


def _open_ready_made(dataset: Dataset, shards: str, folder: Path, home: Home) -> ShardedDataset | SyntheticDataset:
    if shards.startswith(SCHEME):
        return SyntheticDataset(shards, dataset.seq_len, dataset.vocab_size)
    settings = {"seq_len": dataset.seq_len, "pad_id": dataset.pad_id}
    if shards.endswith(".jsonl") and (folder_of := Path(home.resolve(shards)).parent) and _is_ours(str(folder_of)):
        return _listed(Path(home.resolve(shards)), folder_of)
    if is_list(shards):
        return open_list(shards, home, folder, **settings, vocab_size=dataset.vocab_size, eot_id=EOT_ID)
    where = home.resolve(shards)
    if _is_ours(where):
        if is_remote(where):
            return ShardedDataset(folder, remote=where, cache_bytes=dataset.shard_cache_bytes)
        return ShardedDataset(Path(where))
    info = read_tokenizer_info(home.tokenizer(dataset.tokenizer.name))
    vocab_size = dataset.vocab_size or info.num_rows
    return open_foreign(where, folder, **settings, vocab_size=vocab_size, eot_id=info.eot_id)


def _listed(manifest: Path, folder: Path) -> ShardedDataset:
    """Those of our shards in a folder that a manifest beside them lists, in its order, without a copy.

    Raises:
        DataError: it lists a shard that the folder does not have, or with other samples.
    """
    counts, whole = manifest_counts(str(manifest)), ShardedDataset(folder)
    known = {entry.shard: entry for entry in whole.entries}
    for shard, count in counts.items():
        if shard not in known or known[shard].num_sequences != count:
            raise DataError(f"{manifest} lists a shard {shard} of {count} samples, which {folder} does not have")
    entries = [known[shard] for shard in counts]
    if not entries:
        raise DataError(f"{manifest} lists no shard")
    content = [entry.sha256 for entry in entries]
    info = info_of_part(whole.info, sum(counts.values()), len(entries))
    version = hashlib.sha256("\n".join(content).encode()).hexdigest()
    return ShardedDataset(folder, made=(entries, info, version, None))


def _is_ours(where: str) -> bool:
    if not is_remote(where):
        return (Path(where) / DATASET).exists()
    try:
        remote_size(join(where, DATASET))
    except MissingInputError:
        return False
    return True
