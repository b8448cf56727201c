"""Raw text to shards: nothing is lost, and the bytes depend on inputs and settings only."""

import contextlib
import json
import unicodedata
from collections.abc import Callable

import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_dataset import EOT, SEQ_LEN, SmallDataset, documents
from tokenizers import Tokenizer

from openlm_pipeline.pools import DaskSettings, PoolFactory
from openlm_pipeline.shards.dataset import ShardedDataset

Small = Callable[..., SmallDataset]


def check_nothing_is_lost(small: SmallDataset, texts: dict[str, list[str]]) -> None:
    """Every document, NFC-normalised, stands in the shards byte for byte, but for the recorded tail."""
    tokenizer = Tokenizer.from_file(str(small.root / "small_bpe.json"))
    end = tokenizer.token_to_id(EOT)
    totals = ShardedDataset(small.shards).info["totals"]
    recovered = small.recovered()
    expected = {
        (name, record): [*tokenizer.encode(text, add_special_tokens=False).ids, end]
        for name, file_texts in texts.items()
        for record, text in enumerate(file_texts)
    }
    assert totals["documents"] == len(expected) and totals["quarantined"] == 0
    assert totals["tokens"] == sum(map(len, expected.values()))
    assert totals["tokens"] == totals["samples"] * (SEQ_LEN + 1) + totals["tail_tokens"]
    assert 0 <= totals["tail_tokens"] <= SEQ_LEN
    assert set(recovered) <= set(expected)

    missing = 0
    for (name, record), ids in expected.items():
        found = recovered.get((name, record), [])
        missing += len(ids) - len(found)
        assert found == ids[: len(found)]
        if len(found) == len(ids):
            text = tokenizer.decode(found[:-1], skip_special_tokens=False)
            assert text.encode() == unicodedata.normalize("NFC", texts[name][record]).encode()
    assert missing == totals["tail_tokens"]


def test_every_document_comes_back_from_the_shards(small: Small, inline: PoolFactory) -> None:
    texts = {"a.jsonl": documents(40), "b.jsonl": documents(25, 100), "c.jsonl": [""]}
    made = small()
    made.write(texts)
    result = made.run(inline)
    made.manifest()
    check_nothing_is_lost(made, texts)
    assert result.facts["shards"] > 2
    assert result.facts["text_bytes"] == sum(len(t.encode()) for file_texts in texts.values() for t in file_texts)


@settings(deadline=None, max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(drawn=st.lists(st.lists(st.text(max_size=60), min_size=1, max_size=12), min_size=1, max_size=3), data=st.data())
def test_any_text_comes_back_from_the_shards(
    drawn: list[list[str]], data: st.DataObject, small: Small, inline: PoolFactory, tmp_path_factory
) -> None:
    settings = {
        "samples_per_shard": data.draw(st.integers(1, 5), label="samples_per_shard"),
        "shuffle_seed": data.draw(st.integers(0, 2**32), label="shuffle_seed"),
    }
    made = small(tmp_path_factory.mktemp("any_text"), settings)
    texts = {f"{n}.jsonl": file_texts for n, file_texts in enumerate(drawn)}
    texts["0.jsonl"] = [*texts["0.jsonl"], "enough for one sample " * 4]
    made.write(texts)
    made.run(inline)
    check_nothing_is_lost(made, texts)


def test_provenance_covers_each_sample_without_gaps(three_files: SmallDataset, inline: PoolFactory) -> None:
    three_files.run(inline)
    made = ShardedDataset(three_files.shards)
    first = 0
    for entry in made.entries:
        table = pq.read_table(three_files.shards / f"{entry.shard}.provenance.parquet")
        assert table.schema.names == ["sample", "start", "length", "file", "record", "document_start"]
        position = first * (SEQ_LEN + 1)
        for row in table.to_pylist():
            assert row["length"] > 0 and row["start"] + row["length"] <= SEQ_LEN + 1
            assert row["sample"] * (SEQ_LEN + 1) + row["start"] == position
            position += row["length"]
        first += entry.num_sequences
        assert position == first * (SEQ_LEN + 1)
    assert first == len(made)


def test_dataset_json_names_what_it_was_made_from(three_files: SmallDataset, inline: PoolFactory) -> None:
    three_files.run(inline)
    info = json.loads((three_files.shards / "dataset.json").read_text())
    assert set(info["inputs"]) == {"a.jsonl", "b.jsonl", "c.jsonl"}
    assert info["dtype"] == "uint16" and info["seq_len"] == SEQ_LEN
    assert info["tokenizer"]["vocab_size"] == 400
    assert {"tokenizer_sha256", "seq_len", "shuffle_seed", "files"} <= set(info["identity"])


def test_documents_are_shuffled_across_files_by_the_seed(small: Small, inline: PoolFactory) -> None:
    def order(seed: int) -> list[tuple[str, int]]:
        made = small(f"seed_{seed}", {"shuffle_seed": seed})
        made.write({"a.jsonl": documents(30), "b.jsonl": documents(30, 100)})
        made.run(inline)
        rows = pq.read_table(made.shards / "00000000.provenance.parquet").to_pylist()
        return [(r["file"], r["record"]) for r in rows if r["document_start"] == 0]

    one, two = order(1), order(2)
    assert one != two and one != sorted(one)
    assert {name for name, _ in one[:12]} == {"a.jsonl", "b.jsonl"}


def test_one_two_and_four_workers_make_the_same_bytes(
    small: Small, inline: PoolFactory, two_workers: PoolFactory
) -> None:
    texts = {f"{n}.jsonl": documents(5 + 6 * n, 100 * n) for n in range(6)}

    def made_by(folder: str, clients: PoolFactory) -> SmallDataset:
        made = small(folder)
        made.write(texts)
        made.run(clients)
        made.manifest()
        return made

    two = made_by("two", two_workers)
    with DaskSettings(workers=4).pool(lambda line: None) as pool:
        four = made_by("four", lambda report: contextlib.nullcontext(pool))
    one = made_by("one", DaskSettings(workers=1).pool)
    alone = made_by("alone", inline)
    assert one.manifest() == two.manifest() == four.manifest() == alone.manifest()
    shards = {
        name: h for name, h in two.all_hashes().items() if name.endswith((".tar", ".provenance.parquet", ".sums"))
    }
    assert len(shards) == 3 * len(ShardedDataset(two.shards).entries) > 6
    for other in (one, four, alone):
        assert {name: h for name, h in other.all_hashes().items() if name in shards} == shards


@pytest.mark.parametrize("order", [("c", "a", "b"), ("b", "c", "a")])
def test_the_order_in_which_files_are_done_changes_nothing(
    small: Small, inline: PoolFactory, three_files: SmallDataset, order: tuple[str, ...]
) -> None:
    three_files.run(inline)
    other = small("other")
    other.write({"a.jsonl": documents(20), "b.jsonl": documents(35, 100), "c.jsonl": documents(8, 200)})
    other.tokenizer()
    for name in order:
        _, done = other.tokenize(inline, only={f"{name}.jsonl"})
        assert done == [f"{name}.jsonl"]
    files, done = other.tokenize(inline)
    assert done == []
    other.make_shards(files, inline)
    assert other.manifest() == three_files.manifest()
