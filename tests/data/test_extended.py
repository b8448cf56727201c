"""A version that extends another packs what that lacks, and nothing else; together they are as one dataset."""

import shutil

import numpy as np
import pytest
from small_dataset import SmallDataset, documents

from openlm_pipeline.corpus.discovery import discover
from openlm_pipeline.errors import DataError, IdentityError, MissingInputError
from openlm_pipeline.pipeline import data as data_stages
from openlm_pipeline.pipeline.plan import plan
from openlm_pipeline.pipeline.retention import plan_gc
from openlm_pipeline.pipeline.retention_rules import Retention
from openlm_pipeline.pools import PoolFactory
from openlm_pipeline.shards.dataset import ShardedDataset
from openlm_pipeline.shards.opening import open_dataset
from openlm_pipeline.shards.round_trip import round_trip


def later(made: SmallDataset, version: str, extends: str | None, **settings) -> SmallDataset:
    source = {**made.source, "version": version, "extends": extends, **settings}
    return SmallDataset(made.root, made.settings, source)


def run(made: SmallDataset, clients: PoolFactory):
    files, done = made.tokenize(clients)
    return made.make_shards(files, clients), done


@pytest.fixture
def first(small, inline: PoolFactory) -> SmallDataset:
    made = small("home")
    made.write({f"{name}.jsonl": documents(30, 100 * i) for i, name in enumerate("abcd")})
    made.run(inline)
    return made


@pytest.fixture
def second(first: SmallDataset, inline: PoolFactory) -> SmallDataset:
    first.write({"e.jsonl": documents(12, 500)})
    made = later(first, "v2", "v1")
    run(made, inline)
    return made


def folder(made: SmallDataset):
    return made.home.shards("text", made.dataset.version)


def test_only_the_new_file_is_read_and_packed_and_old_samples_keep_their_numbers(
    first: SmallDataset, inline: PoolFactory, no_client: PoolFactory
):
    before = open_dataset(first.dataset, first.home)
    mine = {path: path.stat().st_mtime_ns for path in folder(first).iterdir()}
    first.write({"e.jsonl": documents(12, 500)})
    second = later(first, "v2", "v1")
    made, done = run(second, inline)
    assert done == ["e.jsonl"]
    opened = open_dataset(second.dataset, second.home)
    assert opened.version == made.version != before.version
    alone = ShardedDataset(folder(second))
    assert alone.info["totals"]["files"] == 1
    assert len(opened) == len(before) + len(alone)
    rng = np.random.default_rng(0)
    mixed = rng.permutation(len(opened))
    parts = [before, alone]
    expected = np.concatenate([part.gather(np.arange(len(part))) for part in parts])
    assert (opened.gather(mixed) == expected[mixed]).all()
    assert [opened.shards_of(np.array([i]))[0] for i in (0, len(before))] == [0, len(before.entries)]
    assert (opened.shard_samples(len(before.entries)) == alone.shard_samples(0)).all()
    for name in ("documents", "tokens", "samples", "tail_tokens", "shards", "text_bytes", "files"):
        assert opened.info["totals"][name] == before.info["totals"][name] + alone.info["totals"][name]
    assert opened.info["identity"]["files"].keys() == opened.info["inputs"].keys() == {f"{n}.jsonl" for n in "abcde"}
    assert {path: path.stat().st_mtime_ns for path in folder(first).iterdir()} == mine
    assert opened.verify() == len(opened.entries)
    assert not round_trip(alone, discover(second.dataset, second.home), "text", documents=100).damaged
    again, done = run(second, no_client)
    assert done == [] and again.version == made.version and again.reused


def test_a_third_version_extends_the_second(second: SmallDataset, inline: PoolFactory):
    second.write({"f.jsonl": documents(12, 700)})
    third = later(second, "v3", "v2")
    assert run(third, inline)[1] == ["f.jsonl"]
    opened = open_dataset(third.dataset, third.home)
    assert [s.info["version"] for s in opened.segments] == ["v1", "v2", "v3"]
    assert len(opened) == sum(len(ShardedDataset(folder(v))) for v in (later(second, "v1", None), second, third))
    assert {f.name for f in data_stages.files_before(third.dataset, third.home)} == {f"{n}.jsonl" for n in "abcde"}


def test_the_plan_says_what_is_fresh_and_what_is_new(second: SmallDataset, inline: PoolFactory):
    states = {a.name: a.state for a in plan(second.experiment, second.home).artefacts}
    assert states["shards/text"] == states["tokenized/text"] == "fresh"
    second.write({"f.jsonl": documents(12, 700)})
    states = {a.name: (a.state, a.why) for a in plan(second.experiment, second.home).artefacts}
    assert states["tokenized/text"][0] == "stale" and "1 of 2 raw files" in states["tokenized/text"][1][0]


def test_what_does_not_fit_is_refused_by_name(first: SmallDataset, inline: PoolFactory):
    second = later(first, "v2", "v1")
    with pytest.raises(MissingInputError, match="v2 has no raw file that v1 lacks"):
        second.tokenize(inline)
    first.write({"e.jsonl": documents(12, 500)})
    with pytest.raises(MissingInputError, match="text v2 extends v0, which is not there"):
        later(first, "v2", "v0").tokenize(inline)
    with pytest.raises(IdentityError, match=r"other settings than v2.*special_tokens"):
        later(first, "v2", "v1", special_tokens="text").tokenize(inline)
    first.write({"b.jsonl": documents(30, 101)})
    with pytest.raises(DataError, match=r"b.jsonl is not the one that text v1 was made from"):
        second.tokenize(inline)


def test_another_content_under_the_segment_is_refused(second: SmallDataset, inline: PoolFactory):
    shutil.rmtree(folder(later(second, "v1", None)))
    second.raw("d.jsonl").unlink()
    other = later(second, "v1", None)
    other.make_shards(other.tokenize(inline)[0], inline)
    with pytest.raises(IdentityError, match="v2 extends v1 of content"):
        open_dataset(second.dataset, second.home)


def test_what_is_extended_is_kept(second: SmallDataset, inline: PoolFactory):
    first = later(second, "v1", None)
    aside = folder(first).with_name("v1.superseded-1")
    shutil.copytree(folder(first), aside)
    kept = {k.path.name: k.why for k in plan_gc(second.home, Retention(superseded_days=0)).kept}
    assert kept["v1.superseded-1"] == "shards shards/text/v2 extend it"


def test_a_budget_of_tokens_is_the_first_samples_and_a_smaller_one_begins_a_larger(second: SmallDataset):
    whole = open_dataset(second.dataset, second.home)
    width, versions = whole.format.sample_tokens, {whole.version}
    for count in (3, 32, 33, len(whole) - 1):
        part = open_dataset(later(second, "v2", "v1", max_tokens=count * width + 5).dataset, second.home)
        assert len(part) == sum(part.shard_sizes) == part.info["totals"]["samples"] == count
        assert (part.gather(np.arange(count)) == whole.gather(np.arange(count))).all()
        assert len(part.entries) == part.shards_of(np.array([count - 1]))[0] + 1
        assert len(part.shard_samples(len(part.entries) - 1)) == part.shard_sizes[-1]
        with pytest.raises(IndexError):
            part[count]
        versions.add(part.version)
    assert len(versions) == 5
    more = later(second, "v2", "v1", max_tokens=10**9).dataset
    assert open_dataset(more, second.home).version == whole.version
    assert (
        open_dataset(later(second, "v2", "v1", max_tokens=99).dataset, second.home, whole=True).version == whole.version
    )


def test_a_manifest_of_some_of_our_shards_is_these_without_a_copy(first: SmallDataset, tmp_path):
    whole = ShardedDataset(folder(first))
    lines = (folder(first) / "manifest.jsonl").read_text().splitlines(keepends=True)
    picked = folder(first) / "some.jsonl"
    picked.write_text(lines[2] + lines[0])
    source = {"name": "text", "shards": str(picked)}
    some = SmallDataset(first.root, first.settings, {**source, "files": ()})
    opened = open_dataset(some.dataset, some.home)
    sizes = whole.shard_sizes
    assert len(opened) == sizes[2] + sizes[0]
    assert (opened.shard_samples(0) == whole.shard_samples(2)).all()
    assert (opened[int(sizes[2])] == whole[0]).all()
    assert not list(tmp_path.rglob("*.openlm.tar"))
    picked.write_text('{"shard": "00000009999", "num_sequences": 1}\n')
    with pytest.raises(DataError, match="which .* does not have"):
        open_dataset(some.dataset, some.home)
