"""Where the shards of a recipe's dataset are: made here, published to a store, or ready-made by someone else."""

from pathlib import Path

from openlm_pipeline.errors import ConfigError, MissingInputError
from openlm_pipeline.experiments import Dataset
from openlm_pipeline.shards.dataset import ShardedDataset
from openlm_pipeline.shards.foreign import EOT_ID, is_list, open_foreign, open_list
from openlm_pipeline.shards.manifest import DATASET
from openlm_pipeline.shards.synthetic import SCHEME, SyntheticDataset
from openlm_pipeline.storage.home import Home
from openlm_pipeline.storage.remote import is_remote, join, remote_size
from openlm_pipeline.tokenizers.tokenizer import read_tokenizer_info


def published_url(dataset: Dataset) -> str | None:
    """Where the dataset is copied to, if the recipe says so."""
    return join(join(dataset.shards_url, dataset.name), dataset.version) if dataset.shards_url else None


def open_dataset(dataset: Dataset, home: Home) -> ShardedDataset | SyntheticDataset:
    """The finished shards of a dataset.

    Raises:
        MissingInputError: they are not there.
        ConfigError: they were made with another sequence length.
    """
    folder = home.shards(dataset.name, dataset.version)
    if dataset.source.shards is None:
        opened = ShardedDataset(folder, remote=published_url(dataset), cache_bytes=dataset.shard_cache_bytes)
    else:
        opened = _open_ready_made(dataset, dataset.source.shards, folder, home)
    if opened.info["seq_len"] != dataset.seq_len:
        raise ConfigError(f"{opened.folder} has samples of seq_len {opened.info['seq_len']}, not {dataset.seq_len}")
    return opened


def _open_ready_made(dataset: Dataset, shards: str, folder: Path, home: Home) -> ShardedDataset | SyntheticDataset:
    if shards.startswith(SCHEME):
        return SyntheticDataset(shards, dataset.seq_len, dataset.vocab_size)
    settings = {"seq_len": dataset.seq_len, "pad_id": dataset.pad_id}
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


def _is_ours(where: str) -> bool:
    if not is_remote(where):
        return (Path(where) / DATASET).exists()
    try:
        remote_size(join(where, DATASET))
    except MissingInputError:
        return False
    return True
