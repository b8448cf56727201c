"""Running again does only what is missing or no longer matches; what was made before is set aside, not lost."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from small_dataset import SEQ_LEN, SmallDataset, documents

from openlm_pipeline.corpus.discovery import discover
from openlm_pipeline.errors import DataError
from openlm_pipeline.pipeline import data as data_stages
from openlm_pipeline.pipeline.plan import plan
from openlm_pipeline.pipeline.retention import Retention, plan_gc
from openlm_pipeline.pools import PoolFactory
from openlm_pipeline.shards.dataset import ShardedDataset
from openlm_pipeline.shards.round_trip import round_trip
from openlm_pipeline.storage.files import read_json, write_json
from openlm_pipeline.storage.remote import sha256_url
from openlm_pipeline.tokenization.documents import check_streams
from openlm_pipeline.tokenizers import tokenizer

Small = Callable[..., SmallDataset]


def marks(made: SmallDataset) -> dict[str, int]:
    """Modification time of the file that ends stage 1, by raw file."""
    return {p.name.removesuffix(".json"): p.stat().st_mtime_ns for p in made.tokenized.glob("*.jsonl.json")}


def test_a_second_run_does_nothing(three_files: SmallDataset, inline: PoolFactory, no_client: PoolFactory) -> None:
    first = three_files.run(inline)
    before = {p: p.stat().st_mtime_ns for p in three_files.shards.rglob("*")}
    assert not first.reused and marks(three_files).keys() == {"a.jsonl", "b.jsonl", "c.jsonl"}
    second = three_files.run(no_client)
    assert second.reused and second.version == first.version and second.facts["changed"] == []
    assert {p: p.stat().st_mtime_ns for p in three_files.shards.rglob("*")} == before


def test_a_touched_file_of_the_same_content_is_not_redone(
    three_files: SmallDataset, inline: PoolFactory, no_client: PoolFactory
) -> None:
    three_files.run(inline)
    os.utime(three_files.raw("b.jsonl"), ns=(1, 1))
    assert three_files.run(no_client).reused


def test_only_a_file_of_other_content_is_redone(three_files: SmallDataset, inline: PoolFactory) -> None:
    first = three_files.run(inline)
    before = marks(three_files)
    three_files.write({"b.jsonl": documents(34, 101)})
    files, done = three_files.tokenize(inline)
    assert done == ["b.jsonl"]
    after = marks(three_files)
    assert {name for name in after if after[name] != before[name]} == {"b.jsonl"}
    second = three_files.make_shards(files, inline)
    assert not second.reused and second.version != first.version
    assert [line.split()[0] for line in second.facts["changed"]] == ["files.b.jsonl"]


def test_an_added_and_a_removed_file_change_the_shards(three_files: SmallDataset, inline: PoolFactory) -> None:
    first = three_files.run(inline)
    three_files.write({"d.jsonl": documents(9, 300)})
    added = three_files.run(inline)
    assert added.facts["files"] == 4 and added.version != first.version
    three_files.raw("d.jsonl").unlink()
    removed = three_files.run(inline)
    assert removed.version == first.version
    assert removed.facts["changed"][0].startswith("files.d.jsonl") and "(absent)" in removed.facts["changed"][0]


def test_another_vocabulary_remakes_all_and_keeps_the_old(small: Small, inline: PoolFactory) -> None:
    def with_vocabulary(size: int) -> SmallDataset:
        return small("home", {"tokenizer": {"name": "own", "train": {"vocab_size": size}}})

    made = with_vocabulary(300)
    made.write({"a.jsonl": documents(30), "b.jsonl": documents(30, 100)})
    first = made.run(inline)
    old = made.all_hashes()
    changed = with_vocabulary(320)
    second = changed.run(inline)
    assert not second.reused and second.facts["tokens"] < first.facts["tokens"]
    assert any(line.startswith("tokenizer_sha256") for line in second.facts["changed"])
    aside = SmallDataset(changed.root)
    kept = changed.shards.with_name("v1.superseded-1")
    assert {str(p.relative_to(kept)) for p in kept.rglob("*") if p.is_file()} == set(old)
    ShardedDataset(kept).verify()
    assert (aside.home.tokenizer("own").with_name("own.superseded-1") / "tokenizer.json").exists()
    with_vocabulary(340).run(inline)
    assert changed.shards.with_name("v1.superseded-2").exists()


@pytest.mark.parametrize(
    ("setting", "value", "field"),
    [("samples_per_shard", 16, "samples_per_shard 32 -> 16"), ("shuffle_seed", 7, "shuffle_seed 42 -> 7")],
)
def test_a_packing_setting_remakes_shards_but_not_tokens(
    small: Small, inline: PoolFactory, three_files: SmallDataset, setting: str, value: int, field: str
) -> None:
    three_files.run(inline)
    before = marks(three_files)
    result = small("home", {setting: value}).run(inline)
    assert not result.reused and result.facts["changed"] == [field]
    assert marks(three_files) == before


def test_a_setting_that_only_says_how_to_train_changes_no_shards(
    small: Small, inline: PoolFactory, three_files: SmallDataset, no_client: PoolFactory
) -> None:
    three_files.run(inline)
    training = {"global_batch": 4 * SEQ_LEN, "lr": 9.0}
    assert small("home", {"training": training, "milestones": [1000], "seed": 5}).run(no_client).reused


@pytest.mark.parametrize("damage", [".tokens", ".documents", ".quarantine.jsonl"])
def test_a_lost_file_of_stage_1_is_made_again(three_files: SmallDataset, inline: PoolFactory, damage: str) -> None:
    three_files.run(inline)
    (three_files.tokenized / f"b.jsonl{damage}").unlink()
    _, done = three_files.tokenize(inline)
    assert done == ["b.jsonl"]


def test_a_shortened_stream_is_made_again(three_files: SmallDataset, inline: PoolFactory) -> None:
    three_files.run(inline)
    path = three_files.tokenized / "a.jsonl.tokens"
    whole = path.read_bytes()
    path.write_bytes(whole[:-2])
    assert three_files.tokenize(inline)[1] == ["a.jsonl"]
    assert path.read_bytes() == whole


def test_deleted_shards_come_back_the_same(three_files: SmallDataset, inline: PoolFactory) -> None:
    three_files.run(inline)
    manifest = three_files.manifest()
    (three_files.shards / "manifest.jsonl").unlink()
    three_files.run(inline)
    assert three_files.manifest() == manifest


def test_the_limit_of_bad_records_is_judged_anew_and_changes_no_identity(small: Small, inline: PoolFactory) -> None:
    def with_limit(limit: float) -> SmallDataset:
        return small("home", {"sources": [{"name": "text", "files": ["raw/*.jsonl"], "max_bad_fraction": limit}]})

    made = with_limit(0.5)
    made.write({"a.jsonl": documents(30)})
    made.raw("a.jsonl").write_text(made.raw("a.jsonl").read_text() + "no JSON\n")
    first = made.run(inline)
    assert with_limit(0.4).run(inline).version == first.version
    assert with_limit(0.4).run(inline).reused
    with pytest.raises(DataError, match=r"a.jsonl: 1 of 31 records are bad .*The first is line 41: not valid JSON"):
        with_limit(0.01).run(inline)
    assert with_limit(0.5).run(inline).reused


def test_the_corpus_of_a_tokenizer_is_hashed_once(
    small: Small, inline: PoolFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = small("home", {"tokenizer": {"name": "own", "train": {"vocab_size": 300}}})
    made.write({"a.jsonl": documents(30), "b.jsonl": documents(30, 100)})
    made.run(inline)
    hashed: list[str] = []

    def noted(url: str) -> str:
        hashed.append(Path(url).name)
        return sha256_url(url)

    monkeypatch.setattr(tokenizer, "sha256_url", noted)
    assert made.tokenizer().reused and hashed == []
    os.utime(made.raw("b.jsonl"), ns=(1, 1))
    assert made.tokenizer().reused and hashed == ["b.jsonl"]
    assert made.tokenizer().reused and hashed == ["b.jsonl"]


def test_a_lost_shard_is_made_again_alone(
    three_files: SmallDataset, inline: PoolFactory, no_client: PoolFactory
) -> None:
    three_files.run(inline)
    before = three_files.all_hashes()
    shards = sorted(three_files.shards.glob("*.tar"))
    times = {path: path.stat().st_mtime_ns for path in shards}
    shards[1].unlink()
    shards[2].write_bytes(shards[2].read_bytes()[:-512])
    [reason] = [a.why for a in plan(three_files.experiment, three_files.home).artefacts if a.name == "shards/text"]
    assert "2 shards are missing or not whole" in reason[0] and "00000001.tar, 00000002.tar" in reason[0]

    again = three_files.run(inline)
    assert not again.reused
    assert three_files.all_hashes() == before
    assert {path for path in shards if path.stat().st_mtime_ns != times[path]} == set(shards[1:3])
    assert three_files.run(no_client).reused


def test_a_lost_shard_that_comes_out_otherwise_is_refused(three_files: SmallDataset, inline: PoolFactory) -> None:
    three_files.run(inline)
    three_files.make_first_release()
    manifest = three_files.shards / "manifest.jsonl"
    first, *others = manifest.read_text().splitlines(keepends=True)
    manifest.write_text(first.replace('"sha256": "', '"sha256": "0')[:-1] + "\n" + "".join(others))
    shard = three_files.shards / "00000000.tar"
    shard.unlink()
    with pytest.raises(DataError, match=r"00000000\.tar, made again, is not what .*manifest\.jsonl says"):
        three_files.run(inline)
    assert not shard.exists()


def test_a_resumed_packing_checks_what_it_finds_on_the_pool(three_files: SmallDataset, inline: PoolFactory) -> None:
    three_files.run(inline)
    before = three_files.all_hashes()
    building = three_files.shards / ".building"
    identity = read_json(three_files.shards / "dataset.json")["identity"]
    write_json(building / "identity.json", identity)
    for line in (three_files.shards / "manifest.jsonl").read_text().splitlines():
        write_json(building / f"{json.loads(line)['shard']}.json", json.loads(line))
    (three_files.shards / "manifest.jsonl").unlink()
    damaged = bytearray((three_files.shards / "00000001.tar").read_bytes())
    damaged[700] ^= 1
    (three_files.shards / "00000001.tar").write_bytes(damaged)

    lines: list[str] = []
    files, _ = three_files.tokenize(inline)
    data_stages.make_shards(three_files.dataset, files, three_files.home, inline, lines.append)
    assert three_files.all_hashes() == before


def test_files_of_one_base_name_go_all_the_way(small: Small, inline: PoolFactory, no_client: PoolFactory) -> None:
    made = small(files=["raw/**/*.jsonl"])
    for name in ("a/x.jsonl", "b/x.jsonl", "b/c/x.jsonl"):
        made.raw(name).parent.mkdir(parents=True, exist_ok=True)
    made.write({name: documents(12, 100 * k) for k, name in enumerate(("a/x.jsonl", "b/x.jsonl", "b/c/x.jsonl"))})
    assert made.run(inline).facts["documents"] == 36
    assert {name for name, _ in made.recovered()} == {"a/x.jsonl", "b/x.jsonl", "b/c/x.jsonl"}
    assert not round_trip(ShardedDataset(made.shards), discover(made.dataset, made.home), "text").damaged
    assert made.run(no_client).reused
    [removal] = [
        e for e in plan_gc(made.home, Retention(token_streams=True)).entries if e.path == made.tokenized.resolve()
    ]
    assert "3 raw files" in str(removal)


def test_a_raw_file_that_was_moved_is_not_tokenized_again(small, inline: PoolFactory, no_client: PoolFactory):
    made = small("moved", files=["raw/**/*.jsonl"], max_bad_fraction=0.5)
    made.write({"a.jsonl": documents(20), "b.jsonl": documents(30, 100)})
    with made.raw("a.jsonl").open("a") as f:
        f.write("not JSON\n")
    made.tokenizer()
    before = {file.name: file for file in made.tokenize(inline)[0]}
    stream = (made.tokenized / "a.jsonl.tokens").read_bytes()
    made.raw("new").mkdir()
    made.raw("a.jsonl").rename(made.raw("new") / "c.jsonl")
    os.utime(made.raw("new") / "c.jsonl")
    files, done = made.tokenize(no_client)
    assert done == []
    after = {file.name: file for file in files}
    assert after.keys() == {"b.jsonl", "new/c.jsonl"}
    assert after["new/c.jsonl"].version == before["a.jsonl"].version
    assert (made.tokenized / "new" / "c.jsonl.tokens").read_bytes() == stream
    assert not list(made.tokenized.glob("a.jsonl*"))
    assert [problem for _, problem in check_streams(made.tokenized)] == [None, None]
    made.make_shards(files, inline)
    bad = [json.loads(line) for line in (made.shards / "quarantine.jsonl").read_text().splitlines()]
    assert [line["file"] for line in bad] == [str(made.raw("new") / "c.jsonl")]
    again = small("again", files=["raw/**/*.jsonl"], max_bad_fraction=0.5)
    for name in ("b.jsonl", "new/c.jsonl"):
        again.raw(name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(made.raw(name), again.raw(name))
    again.run(inline)
    assert again.manifest() == made.manifest()


def test_of_two_files_alike_only_one_takes_a_stream_over_and_another_content_does_not(small, inline: PoolFactory):
    made = small("alike")
    made.write({"a.jsonl": documents(20)})
    made.tokenizer()
    made.tokenize(inline)
    text = made.raw("a.jsonl").read_bytes()
    made.raw("a.jsonl").unlink()
    made.raw("b.jsonl").write_bytes(text)
    made.raw("c.jsonl").write_bytes(text)
    made.raw("d.jsonl").write_bytes(text.replace(b"fox", b"cat"))
    files, done = made.tokenize(inline)
    assert done == ["c.jsonl", "d.jsonl"]
    assert len({file.tokens_sha256 for file in files}) == 2
