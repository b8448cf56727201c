"""Documents in the shards are their raw text; damage is told apart from what the tokenizer itself does not keep."""

import json
import unicodedata
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from small_dataset import SmallDataset, documents

from openlm_pipeline.corpus.discovery import discover
from openlm_pipeline.errors import DataError, IdentityError, MissingInputError
from openlm_pipeline.pools import PoolFactory
from openlm_pipeline.shards.dataset import ShardedDataset
from openlm_pipeline.shards.publish import publish
from openlm_pipeline.shards.round_trip import RoundTrip, round_trip

TEXTS = [*documents(20), *documents(35, 100), *documents(8, 200)]
UNTOUCHED = sum(unicodedata.normalize("NFC", text) == text for text in TEXTS)  # the tokenizer normalises


@pytest.fixture
def made(three_files: SmallDataset, inline: PoolFactory) -> SmallDataset:
    three_files.run(inline)
    return three_files


def look(made: SmallDataset, documents: int = 1000, **more: int) -> RoundTrip:
    return round_trip(
        ShardedDataset(made.shards), discover(made.dataset, made.home), "text", documents=documents, **more
    )


def change_token(made: SmallDataset, shard: int, sample: int, token: int) -> None:
    """Another id in one place of a shard's data."""
    dataset = ShardedDataset(made.shards)
    path = dataset.shard_path(shard)
    at = path.read_bytes().find(dataset.gather(np.array([int(dataset.shard_sizes[:shard].sum()) + sample])).tobytes())
    with path.open("r+b") as f:
        f.seek(at + token * dataset.format.numpy_dtype.itemsize)
        f.write((300).to_bytes(2, "little"))


def test_every_document_of_whole_shards_is_its_raw_text_but_for_what_the_tokenizer_normalises(made: SmallDataset):
    found = look(made)
    assert found.damaged == ()
    assert found.lossy == len(TEXTS) - UNTOUCHED > 0
    assert found.exact in (UNTOUCHED, UNTOUCHED - 1)  # a document that reaches into the tail is in no sample whole


def test_few_documents_are_drawn_by_the_seed(made: SmallDataset):
    drawn = [look(made, 5, seed=seed) for seed in range(8)]
    assert {d.exact + d.lossy for d in drawn} == {5}
    assert len({(d.exact, d.lossy) for d in drawn}) > 1
    assert look(made, 5, seed=3) == drawn[3]


def test_one_other_token_is_damage(made: SmallDataset):
    change_token(made, shard=1, sample=4, token=7)
    with pytest.raises(DataError, match=r"00000001.tar is damaged.* 1 of its 32 samples, from sample 4 on"):
        look(made)
    made.reseal()
    (line,) = look(made).damaged
    assert "differs in the shards from its raw text, from token" in line


def test_provenance_that_names_other_documents_is_damage(made: SmallDataset):
    path = made.shards / "00000000.provenance.parquet"
    table = pq.read_table(path)
    record = table["record"].to_numpy()
    pq.write_table(table.set_column(4, "record", pa.array(np.where(record == record[0], record[0] ^ 1, record))), path)
    made.reseal()
    assert look(made).damaged


def test_a_shard_that_is_cut_is_an_error_of_its_own(made: SmallDataset):
    path = made.shards / "00000001.tar"
    path.write_bytes(path.read_bytes()[:-4096])
    with pytest.raises(DataError, match=str(path)):
        look(made)


def test_another_raw_file_is_not_taken_for_damage(made: SmallDataset):
    path = made.raw("a.jsonl")
    rows = [json.loads(line) for line in path.read_text().split("\n") if line]
    path.write_text("".join(json.dumps({"text": row["text"] + "!"}) + "\n" for row in rows))
    with pytest.raises(IdentityError, match=r"a\.jsonl is not the one"):
        look(made)


def test_a_raw_file_that_is_gone_is_named(made: SmallDataset):
    made.raw("b.jsonl").unlink()
    with pytest.raises(MissingInputError, match=r"b\.jsonl"):
        look(made)


def test_published_shards_are_fetched_and_the_folder_stays_as_it_was(made: SmallDataset, tmp_path: Path):
    url = f"memory://{tmp_path.name}/round_trip"
    whole = look(made)
    publish(made.shards, url, lambda line: None, delete_local=True)
    remote = ShardedDataset(made.shards, remote=url)
    assert round_trip(remote, discover(made.dataset, made.home), "text", documents=1000) == whole
    assert list(made.shards.glob("*.provenance.parquet")) == []
