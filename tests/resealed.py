"""Changed shards under a manifest that vouches for them, as if they had been made so."""

from dataclasses import replace
from pathlib import Path

from openlm_pipeline.shards.dataset import ShardedDataset
from openlm_pipeline.shards.format import open_shard
from openlm_pipeline.shards.manifest import finish_dataset
from openlm_pipeline.shards.sums import write_sums
from openlm_pipeline.storage.files import sha256_file


def reseal(folder: Path) -> None:
    """Make the manifest of a finished dataset say what is in its folder now."""
    made = ShardedDataset(folder)
    entries = []
    for k, entry in enumerate(made.entries):
        sums_sha256 = write_sums(folder / entry.sums, open_shard(made.shard_path(k), entry.num_sequences, made.format))
        hashes = {"sha256": sha256_file(folder / entry.tar), "sums_sha256": sums_sha256}
        entries.append(replace(entry, **hashes, provenance_sha256=sha256_file(folder / entry.provenance)))
    finish_dataset(folder, entries, made.info)
