"""Datasets of the mission's size: 205e9 tokens and more are packed and read, on sparse files."""

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import webdataset

from openlm_pipeline.shards.dataset import ShardedDataset
from openlm_pipeline.shards.foreign import open_foreign
from openlm_pipeline.shards.format import SampleFormat
from openlm_pipeline.shards.manifest import DATASET, ShardEntry, write_manifest
from openlm_pipeline.shards.openlm_formats import write_openlm_shard
from openlm_pipeline.storage.files import write_json
from openlm_pipeline.tokenization.documents import INDEX_DTYPE, FileTokens
from openlm_pipeline.tokenization.packing import make_shard, write_order

FORMAT = SampleFormat(2049, "uint16")
PER_SHARD = 8192
DOCUMENT_TOKENS = 10_000_019
WANTED = 100_000_005
"""A sample past the hundred million that eight digits count."""


def sparse(path: Path, size: int) -> None:
    with path.open("wb") as f:
        f.truncate(size)
    assert path.stat().st_blocks * 512 < 1 << 20


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> ShardedDataset:
    """205e9 tokens of one raw file, of which the shard with sample 100,000,005 is made."""
    root = tmp_path_factory.mktemp("pile")
    documents = 20_500
    tokens = documents * DOCUMENT_TOKENS
    assert tokens > 205e9
    sparse(root / "a.tokens", 2 * tokens)
    rows = np.stack([np.arange(documents), np.full(documents, DOCUMENT_TOKENS)], axis=1)
    (root / "a.documents").write_bytes(rows.astype(INDEX_DTYPE).tobytes())
    file = FileTokens(
        name="a",
        identity={},
        stamp="",
        documents=documents,
        quarantined=0,
        tokens=tokens,
        text_bytes=0,
        tokens_sha256="",
        engine="",
        seconds=0.0,
    )
    order = write_order([file], root, seed=1, folder=root / "order")
    assert order.num_tokens == tokens

    folder = root / "shards"
    total = tokens // FORMAT.sample_tokens
    numbers = range(-(-total // PER_SHARD))
    made = {
        n: make_shard(n, PER_SHARD, FORMAT, None, "pile", root, root / "order", folder)
        for n in (WANTED // PER_SHARD, numbers[-1])
    }
    size = FORMAT.shard_bytes(PER_SHARD)
    plain = {"num_sequences": PER_SHARD, "bytes": size, "sha256": "", "tokens": PER_SHARD * FORMAT.sample_tokens}
    entries = [made.get(n) or ShardEntry(shard=f"{n:08d}", source="pile", **plain) for n in numbers]
    sparse(folder / "00000000.tar", size)
    write_json(folder / DATASET, {"seq_len": 2048, "dtype": "uint16"})
    write_manifest(folder, entries)
    return ShardedDataset(folder)


def test_a_dataset_of_the_piles_size_is_packed_and_read(packed: ShardedDataset) -> None:
    assert len(packed) > WANTED and len(packed.entries) > 12_207
    samples = packed.gather(np.array([0, WANTED, len(packed) - 1]))
    assert samples.shape == (3, 2049) and not samples.any()


def test_members_past_a_hundred_million_have_wider_names(packed: ShardedDataset) -> None:
    shard = packed.shard_path(WANTED // PER_SHARD)
    keys = [sample["__key__"] for sample in webdataset.WebDataset(str(shard), shardshuffle=False, empty_check=False)]
    first = WANTED // PER_SHARD * PER_SHARD
    assert first < 10**8 < first + PER_SHARD
    assert keys == [f"{first + k:08d}" for k in range(PER_SHARD)]


def test_provenance_counts_on(packed: ShardedDataset) -> None:
    shard = packed.shard_path(WANTED // PER_SHARD)
    rows = pq.read_table(shard.with_suffix(".provenance.parquet"), filters=[("sample", "==", WANTED)])
    assert rows.num_rows == 1 and rows["length"].to_pylist() == [2049]


def test_ready_made_shards_past_a_hundred_million_samples_are_read(tmp_path: Path) -> None:
    folder = tmp_path / "openlm"
    folder.mkdir()
    write_openlm_shard(folder / "last.tar", np.arange(27).reshape(3, 9), 0, format="json")
    counts = {"first": 10**8 - 1, "last": 3}
    lines = [json.dumps({"shard": shard, "num_sequences": n}) for shard, n in counts.items()]
    (folder / "manifest.jsonl").write_text("\n".join(lines))
    opened = open_foreign(folder, tmp_path / "cache", seq_len=8, vocab_size=100, eot_id=0)
    assert opened.gather(np.array([10**8 - 1, 10**8 + 1])).tolist() == [list(range(9)), list(range(18, 27))]


def test_four_trillion_tokens_open_in_moderate_memory_and_time(tmp_path: Path) -> None:
    shards, samples = 100_000, 20_000
    entry = {"num_sequences": samples, "bytes": FORMAT.shard_bytes(samples), "sha256": "a" * 64, "source": "all"}
    entries = [ShardEntry(shard=f"{k:08d}", tokens=samples * FORMAT.sample_tokens, **entry) for k in range(shards)]
    write_json(tmp_path / DATASET, {"seq_len": 2048, "dtype": "uint16"})
    write_manifest(tmp_path, entries)
    opened = ShardedDataset(tmp_path)
    assert len(opened) == 2_000_000_000
    sparse(tmp_path / f"{shards - 1:08d}.tar", FORMAT.shard_bytes(samples))
    assert not opened[len(opened) - 1].any()
