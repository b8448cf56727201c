"""A function of the user's on each document: what it keeps, changes and drops is counted and proved, anywhere."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from small_dataset import SmallDataset, documents
from typer.testing import CliRunner

from openlm_pipeline.cli.main import app
from openlm_pipeline.corpus.discovery import discover
from openlm_pipeline.corpus.reader import RecordReader
from openlm_pipeline.errors import ConfigError
from openlm_pipeline.pipeline.plan import REFUSED, plan
from openlm_pipeline.pools import DaskSettings, PoolFactory
from openlm_pipeline.shards.dataset import ShardedDataset
from openlm_pipeline.shards.round_trip import round_trip
from openlm_pipeline.tokenization.job import tokenize_files
from openlm_pipeline.tokenizers.tokenizer import read_tokenizer_info

MODULE = """
from openlm_pipeline.corpus.maps import Document, Drop

def clean(document: Document, shortest: int = 0):
    if document.fields.get("meta.set") == "spam":
        return Drop("spam")
    if len(document.text) < shortest:
        return None
    return document.text.replace("fox", "cat")

def fails(document):
    return 1 / (len(document.text) - 30)

def lists(document):
    return [document.text]
"""
MAP = {"function": "my_maps:clean", "version": "1", "arguments": {"shortest": 25}, "fields": ("meta.set",)}
TEXTS = documents(90)
SETS = ["web", "books", "spam"]
KEPT = [(i, t) for i, t in enumerate(TEXTS) if SETS[i % 3] != "spam" and len(t) >= 25]
SPAM = sum(SETS[i % 3] == "spam" for i in range(90))


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "my_maps.py"
    path.write_text(MODULE)
    monkeypatch.setenv("OPENLM_MAP_MODULES", str(path))
    return path


@pytest.fixture
def mapped(small, module) -> SmallDataset:
    made = small(map=MAP, breakdown="meta.set")
    made.raw("a.jsonl").parent.mkdir(parents=True)
    rows = [{"text": text, "meta": {"set": SETS[i % 3]}} for i, text in enumerate(TEXTS)]
    made.raw("a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return made


def test_what_is_kept_changed_and_dropped_adds_up_and_is_the_raw_text_after_the_map(
    mapped: SmallDataset, inline: PoolFactory
):
    made = mapped.run(inline)
    dataset = ShardedDataset(mapped.shards)
    totals = dataset.info["totals"]
    assert dataset.info["dropped"] == {"dropped": 90 - SPAM - len(KEPT), "spam": SPAM}
    assert totals["documents"] == len(KEPT) and totals["documents"] + totals["dropped"] == 90
    assert totals["changed"] == made.facts["changed_documents"] == sum("fox" in text for _, text in KEPT) > 0
    assert totals["text_bytes"] == sum(len(text.replace("fox", "cat").encode()) for _, text in KEPT)
    breakdown = dataset.info["breakdown"]
    assert {name: row[0] for name, row in breakdown.items()} == {
        name: sum(SETS[i % 3] == name for i, _ in KEPT) for name in ("books", "web")
    }
    assert [sum(column) for column in zip(*breakdown.values())] == [
        totals[name] for name in ("documents", "text_bytes", "tokens")
    ]
    found = round_trip(
        dataset, discover(mapped.dataset, mapped.home), "text", documents=1000, map=mapped.dataset.source.map
    )
    assert not found.damaged and found.exact + found.lossy >= len(KEPT) - 1
    assert round_trip(dataset, discover(mapped.dataset, mapped.home), "text", documents=1000).damaged
    result = CliRunner().invoke(app, ["shards", "stats", str(mapped.shards)])
    for part in ("left out by the source's map or list", "  spam", "meta.set", "books"):
        assert part in result.output, part


def test_the_same_in_parts_on_workers_from_arrays_and_from_parquet(
    mapped: SmallDataset, small, module: Path, inline: PoolFactory
):
    environment = {"env": {"OPENLM_MAP_MODULES": str(module)}}  # of workers that were forked before it was set
    two_workers = DaskSettings(workers=2, options=environment).pool
    mapped.run(inline)
    (whole,) = mapped.tokenize(inline)[0]
    rows = [json.loads(line) for line in mapped.raw("a.jsonl").read_text().splitlines()]
    for name, clients in (("a.json", inline), ("a.parquet", inline), ("a.jsonl", two_workers)):
        other = small(f"home_{name}", files=[f"raw/{name}"], map=MAP, breakdown="meta.set")
        other.raw(name).parent.mkdir(parents=True)
        if name == "a.parquet":
            pq.write_table(pa.Table.from_pylist(rows), other.raw(name), row_group_size=20)
        elif name == "a.json":
            other.raw(name).write_text(json.dumps(rows))
        else:
            other.raw(name).write_bytes(mapped.raw(name).read_bytes() * 40)
        other.tokenizer()
        info = read_tokenizer_info(other.home.tokenizer("small_bpe"))
        args = (info, other.home.tokenizer("small_bpe"), other.tokenized, clients, print)
        (made,), _ = tokenize_files(other.dataset, discover(other.dataset, other.home), *args, min_part_bytes=64 << 10)
        times = 40 if name == "a.jsonl" else 1
        assert made.dropped == {reason: times * count for reason, count in whole.dropped.items()}
        assert made.breakdown == {key: [times * n for n in row] for key, row in whole.breakdown.items()}
        assert (made.documents, made.tokens) == (times * whole.documents, times * whole.tokens)
        if times == 1:
            assert made.tokens_sha256 == whole.tokens_sha256
        else:
            tokens, index = (mapped.tokenized / f"a.jsonl.{kind}" for kind in ("tokens", "documents"))
            assert (other.tokenized / "a.jsonl.tokens").read_bytes() == tokens.read_bytes() * 40
            assert (other.tokenized / "a.jsonl.documents").stat().st_size == index.stat().st_size * 40


def test_another_file_version_or_argument_is_other_data_and_the_same_is_not_done_again(
    mapped: SmallDataset, small, module: Path, inline: PoolFactory, no_client: PoolFactory
):
    mapped.run(inline)
    assert mapped.tokenize(no_client)[1] == []
    module.write_text(MODULE.replace('"cat"', '"dog"'))
    assert mapped.tokenize(inline)[1] == ["a.jsonl"]
    module.write_text(MODULE)
    assert mapped.tokenize(inline)[1] == ["a.jsonl"]
    for change in ({"version": "2"}, {"arguments": {"shortest": 26}}):
        other = SmallDataset(mapped.root, mapped.settings, {**mapped.source, "map": {**MAP, **change}})
        assert other.tokenize(inline)[1] == ["a.jsonl"]


@pytest.mark.parametrize(
    "function, said",
    [
        ("my_maps:fails", r"my_maps:fails failed on the record at byte or row \d+ of .*ZeroDivisionError"),
        ("my_maps:lists", "it returned list, and not a string"),
        ("my_maps:claen", "has no function 'claen'; .*clean"),
        ("other_maps:clean", "OPENLM_MAP_MODULES does not name other_maps"),
        ("os:system", "OPENLM_MAP_MODULES does not name os"),
    ],
)
def test_a_function_that_may_not_or_can_not_run_is_named(small, module, inline: PoolFactory, function: str, said: str):
    made = small(map={"function": function, "version": "1"})
    made.write({"a.jsonl": ["x" * 30]})
    made.tokenizer()
    with pytest.raises(ConfigError, match=said):
        made.tokenize(inline)
    assert not list(made.home.root.rglob("*.json.tokens"))


def test_nothing_of_a_module_runs_before_it_is_allowed(small, tmp_path: Path, monkeypatch, inline: PoolFactory):
    (tmp_path / "sly.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\ndef keep(document): return document\n")
    monkeypatch.syspath_prepend(tmp_path)
    made = small(map={"function": "sly:keep", "version": "1"})
    made.write({"a.jsonl": documents(5)})
    made.tokenizer()
    with pytest.raises(ConfigError, match="set OPENLM_MAP_MODULES=sly"):
        made.tokenize(inline)
    assert not (tmp_path / "ran").exists()
    monkeypatch.setenv("OPENLM_MAP_MODULES", "sly")
    made.tokenize(inline)
    assert (tmp_path / "ran").exists()


def test_fields_are_found_by_their_own_name_or_by_dots_and_are_none_where_they_are_not(tmp_path: Path):
    rows = [{"text": "a", "x.y": 1, "x": {"y": 2, "z": [3]}}, {"text": "b"}, {"text": "c", "x": None}]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    fields = ("x.y", "x.z", "w")
    found = [r.fields for r in RecordReader(str(path), on_bad=print, fields=fields)]
    assert found == [{"x.y": 1, "x.z": [3], "w": None}, *[dict.fromkeys(fields)] * 2]
    pq.write_table(pa.Table.from_pylist([{"text": "a", "x": {"y": 2}}, {"text": "b"}]), tmp_path / "a.parquet")
    found = [r.fields for r in RecordReader(str(tmp_path / "a.parquet"), on_bad=print, fields=fields)]
    assert found == [{"x.y": 2, "x.z": None, "w": None}, dict.fromkeys(fields)]


def test_whoever_trains_on_the_shards_needs_no_code_and_whoever_makes_them_is_told(
    mapped: SmallDataset, inline: PoolFactory, monkeypatch: pytest.MonkeyPatch
):
    mapped.tokenizer()
    monkeypatch.delenv("OPENLM_MAP_MODULES")
    (shards,) = [a for a in plan(mapped.experiment, mapped.home).artefacts if a.name.startswith("shards/")]
    assert (shards.state, shards.consent) == ("missing", REFUSED) and "OPENLM_MAP_MODULES" in shards.why[0]
    monkeypatch.setenv("OPENLM_MAP_MODULES", str(mapped.root.parent / "my_maps.py"))
    mapped.run(inline)
    monkeypatch.delenv("OPENLM_MAP_MODULES")
    (shards,) = [a for a in plan(mapped.experiment, mapped.home).artefacts if a.name.startswith("shards/")]
    assert shards.state == "fresh" and "as far as can be told here" in shards.why[0]
