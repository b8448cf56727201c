"""Bad input: a quarantine record, or an error that names what is wrong, where, and what to do."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard
from small_dataset import SmallDataset, as_line, documents, message_of, write_lines

from openlm_pipeline.corpus import blocks
from openlm_pipeline.corpus.discovery import discover
from openlm_pipeline.corpus.formats import format_of
from openlm_pipeline.errors import ConfigError, DataError, MissingInputError, OpenLMError
from openlm_pipeline.pipeline import data as data_stages
from openlm_pipeline.pools import DaskSettings, PoolFactory
from openlm_pipeline.shards.dataset import ShardedDataset
from openlm_pipeline.tokenization.documents import FileTokens, join_parts, tokenize_part
from openlm_pipeline.tokenizers.tokenizer import read_tokenizer_info

Small = Callable[..., SmallDataset]


def with_tokenizer(**tokenizer: object) -> dict[str, object]:
    return {"tokenizer": {"name": "other", **tokenizer}}


def fails(made: SmallDataset, error: type[OpenLMError], clients: PoolFactory, *parts: str) -> None:
    with pytest.raises(OpenLMError) as caught:
        made.run(clients)
    assert type(caught.value) is error
    message_of(caught.value, *parts)


def test_bad_records_below_the_threshold_go_to_quarantine(small: Small, inline: PoolFactory) -> None:
    made = small(max_bad_fraction=0.2)
    texts = documents(20)
    lines = [as_line(n, text) for n, text in enumerate(texts)]
    bad = {3: '{"text": "cut', 7: '{"title": "no text"}', 11: '{"text": 5}'}
    for position, line in bad.items():
        lines.insert(position, line)
    write_lines(made.raw("a.jsonl"), lines)
    made.write({"b.jsonl": documents(20, 100)})
    totals = made.run(inline).facts

    assert totals["documents"] == 40 and totals["quarantined"] == 3
    good = [number for number in range(23) if number not in bad]
    assert {record for name, record in made.recovered() if name == "a.jsonl"} == set(good)
    records = [json.loads(line) for line in (made.shards / "quarantine.jsonl").read_text().splitlines()]
    assert [(r["file"], r["line"]) for r in records] == [(str(made.raw("a.jsonl")), position + 1) for position in bad]
    content = made.raw("a.jsonl").read_bytes()
    for record, line in zip(records, bad.values(), strict=True):
        assert content[record["offset"] :].startswith(line.encode())
    reasons = [r["reason"] for r in records]
    assert "not valid JSON" in reasons[0] and "no field 'text'" in reasons[1] and "is a number" in reasons[2]


@pytest.mark.parametrize(
    ("line", "reason"), [('{"text": "cut', "not valid JSON"), ('{"title": "x"}', "no field 'text'")]
)
def test_too_many_bad_records_fail_their_file_and_keep_the_others(
    small: Small, inline: PoolFactory, line: str, reason: str
) -> None:
    made = small(max_bad_fraction=0.01)
    made.write({"a.jsonl": documents(40)})
    write_lines(made.raw("b.jsonl"), [as_line(0, "good"), line])
    fails(made, DataError, inline, str(made.raw("b.jsonl")), "1 of 2 records are bad", "line 2", reason, "Repair")
    assert not (made.tokenized / "b.jsonl.json").exists() and not made.shards.exists()
    assert not list(made.tokenized.glob("*.tmp"))

    write_lines(made.raw("b.jsonl"), [as_line(0, "good")])
    _, done = made.tokenize(inline)
    assert done == ["b.jsonl"]


def test_a_truncated_archive_fails_and_nothing_of_it_is_kept(small: Small, inline: PoolFactory) -> None:
    made = small(files=["raw/*.jsonl.zst"])
    path = made.raw("a.jsonl.zst")
    write_lines(path, [as_line(n, text) for n, text in enumerate(documents(200))])
    whole = zstandard.compress(path.read_bytes())
    path.write_bytes(whole[: len(whole) // 2])
    fails(made, DataError, inline, str(path), "truncated", "compressed byte", "Fetch it again")
    assert [p.name for p in made.tokenized.iterdir()] == [".lock"]
    path.write_bytes(whole)
    assert made.run(inline).facts["documents"] == 200


def test_a_truncated_archive_in_a_worker_process(small: Small, two_workers: PoolFactory) -> None:
    made = small(files=["raw/*.zst"])
    path = made.raw("a.jsonl.zst")
    write_lines(path, [as_line(0, "text")])
    path.write_bytes(zstandard.compress(path.read_bytes())[:-2])
    fails(made, DataError, two_workers, str(path), "truncated")


def test_an_empty_file_holds_no_documents(small: Small, inline: PoolFactory) -> None:
    made = small()
    made.write({"a.jsonl": documents(20)})
    made.raw("b.jsonl").write_bytes(b"")
    assert made.run(inline).facts["documents"] == 20


@pytest.fixture
def half_bad(small: Small) -> Callable[..., SmallDataset]:
    """Three whole files and three broken ones."""

    def write(**source: object) -> SmallDataset:
        made = small(files=["raw/*.zst"], **source)
        for n in range(6):
            content = "".join(as_line(k, text) + "\n" for k, text in enumerate(documents(20, 100 * n))).encode()
            data = zstandard.compress(content)
            made.raw(f"{n}.jsonl.zst").parent.mkdir(exist_ok=True, parents=True)
            made.raw(f"{n}.jsonl.zst").write_bytes({1: data[:-9], 3: data[: len(data) // 2], 5: b""}.get(n, data))
        return made

    return write


@pytest.mark.parametrize("workers", [1, 2])
def test_one_run_names_all_bad_files(half_bad: Callable[..., SmallDataset], workers: int) -> None:
    made = half_bad()
    names = [str(made.raw(f"{n}.jsonl.zst")) for n in (1, 3, 5)]
    fails(made, DataError, DaskSettings(workers=workers).pool, "3 files can't be used", "on_bad_file: skip", *names)
    assert {p.name for p in made.tokenized.glob("*.zst.json")} == {f"{n}.jsonl.zst.json" for n in (0, 2, 4)}


def test_bad_files_can_be_left_out_and_are_counted(
    half_bad: Callable[..., SmallDataset], inline: PoolFactory, no_client: PoolFactory
) -> None:
    made = half_bad(on_bad_file="skip")
    totals = made.run(inline).facts
    assert totals["files"] == 3 and totals["skipped_files"] == 3 and totals["documents"] == 60
    info = ShardedDataset(made.shards).info
    assert set(info["skipped"]) == {"1.jsonl.zst", "3.jsonl.zst", "5.jsonl.zst"}
    assert "truncated" in info["skipped"]["3.jsonl.zst"]
    assert made.run(no_client).reused  # they are not read again

    whole = zstandard.compress((as_line(0, "now whole") + "\n").encode())
    made.raw("5.jsonl.zst").write_bytes(whole)
    totals = made.run(inline).facts
    assert totals["files"] == 4 and totals["skipped_files"] == 2
    fails(half_bad(), DataError, inline, "3 files can't be used")


def test_missing_raw_files_say_where_it_looked(small: Small, no_client: PoolFactory) -> None:
    made = small()
    fails(made, MissingInputError, no_client, str(made.root / "raw" / "*.jsonl"), "'text'", "Put the files there")


def test_text_for_less_than_one_sample_fails(small: Small, inline: PoolFactory) -> None:
    made = small()
    made.write({"a.jsonl": ["a"]})
    fails(made, DataError, inline, "dataset text has 2 tokens, fewer than one sample of 17", "give it more text")
    assert not (made.shards / "manifest.jsonl").exists()
    made.write({"a.jsonl": documents(20)})
    assert not made.run(inline).reused


def test_a_missing_tokenizer_file_says_what_to_give(small: Small, no_client: PoolFactory) -> None:
    made = small(settings=with_tokenizer(source="/nowhere/tokenizer.json"))
    made.write({"a.jsonl": ["a"]})
    fails(made, MissingInputError, no_client, "no tokenizer at /nowhere/tokenizer.json", "OPENLM_TOKENIZER")


def test_a_hub_tokenizer_out_of_reach_says_what_to_give(
    small: Small, no_client: PoolFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # the variable is read at import
    made = small(settings=with_tokenizer(source="nobody/no-such-tokenizer"))
    made.write({"a.jsonl": ["a"]})
    fails(made, MissingInputError, no_client, "nobody/no-such-tokenizer", "Hugging Face hub", "OPENLM_TOKENIZER")
    assert not (made.home.tokenizer("other") / "tokenizer_info.json").exists()


def test_missing_raw_files_are_said_before_a_tokenizer_is_looked_for(small: Small, no_client: PoolFactory) -> None:
    made = small(settings=with_tokenizer(source="/nowhere/tokenizer.json"))
    fails(made, MissingInputError, no_client, "match no raw file")


def test_a_tokenizer_without_the_end_token_is_refused(small: Small, no_client: PoolFactory) -> None:
    made = small()
    source = str(made.root / "small_bpe.json")
    made = small(settings=with_tokenizer(source=source, eot="</s>"))
    made.write({"a.jsonl": ["a"]})
    for _ in range(2):  # the second time too: what was fetched is not taken for a tokenizer
        fails(made, ConfigError, no_client, "tokenizer other has no token '</s>'", "`tokenizer.eot`")


def test_a_file_that_is_no_tokenizer_is_refused(small: Small, no_client: PoolFactory) -> None:
    made = small()
    path = made.root / "notes.json"
    path.write_text('{"not": "a tokenizer"}')
    made = small(settings=with_tokenizer(source=str(path)))
    made.write({"a.jsonl": ["a"]})
    fails(made, ConfigError, no_client, str(path), "is not a tokenizer.json")


def test_a_tokenizer_that_was_altered_in_place_is_noticed(three_files: SmallDataset, inline: PoolFactory) -> None:
    three_files.run(inline)
    path = three_files.home.tokenizer("small_bpe") / "tokenizer.json"
    path.write_text(path.read_text() + " ")
    fails(three_files, DataError, inline, str(path), "delete the folder")


def test_without_the_tokenizer_stage_the_others_say_so(three_files: SmallDataset, no_client: PoolFactory) -> None:
    with pytest.raises(MissingInputError) as caught:
        three_files.tokenize(no_client)
    message_of(caught.value, str(three_files.home.tokenizer("small_bpe")), "`openlm tokenize RECIPE`")


def test_a_damaged_shard_of_an_unfinished_dataset_is_made_again(three_files: SmallDataset, inline: PoolFactory) -> None:
    """A shard whose note is there but whose bytes are not as noted must not enter the manifest."""
    three_files.tokenizer()
    files, _ = three_files.tokenize(inline)

    def stop_before_the_manifest(line: str) -> None:
        if line.startswith("packing"):
            raise InterruptedError

    with pytest.raises(InterruptedError):
        data_stages.make_shards(three_files.dataset, files, three_files.home, inline, stop_before_the_manifest)
    shard = three_files.shards / "00000000.tar"
    good = shard.read_bytes()
    shard.write_bytes(b"x" + good[1:])
    three_files.make_shards(files, inline)
    ShardedDataset(three_files.shards).verify()
    assert shard.read_bytes() == good


def test_a_scheduler_address_of_no_protocol_is_named() -> None:
    with (
        pytest.raises(MissingInputError, match="no Dask scheduler answers at carrier-pigeon://roof"),
        DaskSettings(address="carrier-pigeon://roof").pool(lambda line: None),
    ):
        pass


def flip(path: Path, at: int = 9) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def test_a_damaged_index_is_not_packed(three_files: SmallDataset, inline: PoolFactory) -> None:
    three_files.tokenizer()
    files, _ = three_files.tokenize(inline)
    flip(three_files.tokenized / "b.jsonl.documents", 16)  # a record's number: the tokens still add up
    with pytest.raises(DataError) as caught:
        three_files.make_shards(files, inline)
    message_of(caught.value, "b.jsonl.documents is damaged: its sha256", "delete b.jsonl.json")
    (three_files.tokenized / "b.jsonl.json").unlink()
    assert not three_files.run(inline).reused


@pytest.mark.parametrize("kind", ["tokens", "documents"])
def test_a_part_that_is_damaged_before_it_is_joined_is_made_again(
    small: Small, inline: PoolFactory, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 64)
    made = small()
    made.write({"a.jsonl": documents(40)})
    made.tokenizer()
    folder = made.home.tokenizer("small_bpe")
    info = read_tokenizer_info(folder)
    [raw] = discover(made.dataset, made.home)
    parts = format_of(raw.url).cut(raw.size_bytes, 3)
    args = (info, folder, made.tokenized)

    def tokenize() -> None:
        for number, part in enumerate(parts):
            tokenize_part(made.dataset, raw, part, number, *args, progress=lambda facts: None)

    def join() -> FileTokens:
        return join_parts(made.dataset, raw, len(parts), info, made.tokenized, progress=lambda facts: None)

    tokenize()
    flip(made.tokenized / f"a.jsonl.part-00001.{kind}")
    with pytest.raises(DataError, match=rf"part-00001\.{kind} is damaged: its sha256 is not the recorded one"):
        join()
    tokenize()
    [whole] = made.tokenize(inline)[0] if join() else []
    assert whole.documents == 40
    assert made.make_shards([whole], inline).facts["documents"] == 40
