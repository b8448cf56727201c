"""Workers that share no disk: what goes through a store comes out as the bytes that one machine makes."""

import shutil
from pathlib import Path

import pytest
from small_dataset import SmallDataset, documents

from openlm_pipeline.errors import ConfigError, DataError
from openlm_pipeline.pools import PoolFactory
from openlm_pipeline.shards.opening import open_dataset, published_url
from openlm_pipeline.tokenization import exchange
from openlm_pipeline.tokenization.job import tokenize_files

TEXTS = {f"{i:02d}.jsonl": documents(7 + i % 5, 100 * i) for i in range(20)}


@pytest.fixture(params=[{}, {"pad_id": 1}], ids=["tail", "padded"])
def alone(request, small, inline: PoolFactory, monkeypatch: pytest.MonkeyPatch) -> SmallDataset:
    monkeypatch.setattr("openlm_pipeline.tokenization.packing._INDEX_ROWS", 23)
    monkeypatch.setattr(exchange, "_ROWS", 5)
    made = small("alone", {"samples_per_shard": 4, **request.param})
    made.write(TEXTS)
    made.run(inline)
    return made


@pytest.fixture
def apart(alone: SmallDataset, tmp_path: Path, small, monkeypatch: pytest.MonkeyPatch) -> SmallDataset:
    monkeypatch.setenv("OPENLM_EXCHANGE", f"file://{tmp_path}/exchange")
    monkeypatch.setattr(exchange, "UNITS", 6)
    monkeypatch.setattr(exchange, "GROUPS", 5)
    monkeypatch.setattr("openlm_pipeline.tokenization.packing_job.BLOCK_DOCUMENTS", 50)
    made = small("apart", {**alone.settings, "execution": {"shards_url": f"file://{tmp_path}/bucket"}})
    made.write(TEXTS)
    made.tokenizer()
    return made


def bucket(made: SmallDataset) -> dict[str, bytes]:
    folder = Path(published_url(made.dataset).removeprefix("file://"))
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def run(made: SmallDataset, clients: PoolFactory) -> list[str]:
    files, done = made.tokenize(clients)
    made.make_shards(files, clients)
    return done


def test_the_bytes_are_those_of_one_machine(
    alone: SmallDataset, apart: SmallDataset, inline: PoolFactory, no_client: PoolFactory, tmp_path: Path
):
    assert run(apart, inline) == sorted(TEXTS)
    same = {path.name: path.read_bytes() for path in alone.shards.iterdir() if path.is_file()}
    there = bucket(apart)
    assert there.keys() == same.keys()
    assert {
        name for name in same if name.endswith((".tar", ".sums", ".parquet")) and same[name] != there[name]
    } == set()
    strip = lambda data: data.replace(str(alone.root).encode(), b"").replace(str(apart.root).encode(), b"")  # noqa: E731
    assert strip(there["quarantine.jsonl"]) == strip(same["quarantine.jsonl"])
    assert there["manifest.jsonl"].splitlines()[1:] == same["manifest.jsonl"].splitlines()[1:]
    opened = open_dataset(apart.dataset, apart.home)
    assert opened.version == open_dataset(alone.dataset, alone.home).version
    assert not list(apart.tokenized.glob("*.tokens")) and not list(apart.tokenized.glob("*.documents"))
    assert not list((tmp_path / "exchange").rglob("packing-*/*"))
    assert run(apart, no_client) == []


def test_what_was_done_stays_and_a_client_that_lost_its_disk_goes_on(
    alone: SmallDataset, apart: SmallDataset, inline: PoolFactory, no_client: PoolFactory, monkeypatch
):
    real, calls = exchange.gather, []

    def dies(shuffle, group, *arguments, **more):
        calls.append(group)
        if len(calls) == 3:
            raise RuntimeError("killed")
        return real(shuffle, group, *arguments, **more)

    monkeypatch.setattr("openlm_pipeline.tokenization.packing_job.gather", dies)
    with pytest.raises(RuntimeError, match="killed"):
        run(apart, inline)
    assert len(calls) == 3
    shutil.rmtree(apart.home.root / "tokenized")
    shutil.rmtree(apart.home.root / "shards")
    assert apart.tokenize(no_client)[1] == []
    assert run(apart, inline) == []
    assert sorted(calls[3:]) == sorted({*range(max(calls) + 1)} - set(calls[:2]))
    assert open_dataset(apart.dataset, apart.home).version == open_dataset(alone.dataset, alone.home).version


@pytest.mark.parametrize("kind", ["tokens", "documents"])
def test_damage_in_the_store_is_named(apart: SmallDataset, inline: PoolFactory, tmp_path: Path, kind: str):
    files, _ = apart.tokenize(inline)
    stream = next((tmp_path / "exchange").rglob(f"streams/07.jsonl.{kind}"))
    data = bytearray(stream.read_bytes())
    data[5] ^= 1
    stream.write_bytes(data)
    with pytest.raises(DataError, match=f"07.jsonl.{kind} is damaged"):
        apart.make_shards(files, inline)


DEALT = {  # object: notes without which it is read again
    "*.places": "block-*",
    "*.starts": "unit-*",
    "order-*": "group-*",
    "*.tokens": "group-*",
    "*.pieces": "group-*",
    "block-*.done.json": "group-*",
}


def test_damage_of_what_workers_hand_on_is_named(
    alone: SmallDataset, apart: SmallDataset, inline: PoolFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    files, _ = apart.tokenize(inline)
    with monkeypatch.context() as patch:
        patch.setattr(exchange.Shuffle, "clear", lambda shuffle: None)
        apart.make_shards(files, inline)
    (work,) = (tmp_path / "exchange").rglob("packing-*")
    for pattern, notes in DEALT.items():
        for damage in (flipped, lambda data: data[: len(data) // 2]):
            shutil.rmtree(apart.shards)
            for note in work.glob(f"{notes}.done.json"):
                note.unlink()
            path = min(work.glob(pattern))
            whole = path.read_bytes()
            path.write_bytes(damage(whole))
            with pytest.raises(DataError, match=path.name):
                apart.make_shards(files, inline)
            path.write_bytes(whole)
            with monkeypatch.context() as patch:
                patch.setattr(exchange.Shuffle, "clear", lambda shuffle: None)
                apart.make_shards(files, inline)
    assert open_dataset(apart.dataset, apart.home).version == open_dataset(alone.dataset, alone.home).version


def flipped(data: bytes) -> bytes:
    """With another bit in its middle; in text, another digit in its first number."""
    at = next((i for i, byte in enumerate(data) if chr(byte).isdigit()), 0) if data[:1] == b"{" else len(data) // 2
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


def test_a_large_file_is_cut_and_its_parts_are_not_joined(
    small, inline: PoolFactory, no_client: PoolFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(tokenize_files.__kwdefaults__, "min_part_bytes", 1)
    texts = {"a.jsonl": [f"{n} {text}" for n in range(60) for text in documents(60, n)], "b.jsonl": documents(9, 900)}
    alone = small("alone", {"samples_per_shard": 64})
    alone.write(texts)
    alone.run(inline)
    monkeypatch.setenv("OPENLM_EXCHANGE", f"file://{tmp_path}/exchange")
    apart = small("apart", {**alone.settings, "execution": {"shards_url": f"file://{tmp_path}/bucket"}})
    apart.write(texts)
    apart.tokenizer()
    assert run(apart, inline) == sorted(texts)
    streams = tmp_path / "exchange" / "text" / "v1" / "streams"
    assert len(list(streams.glob("a.jsonl.part-*.tokens"))) > 2 and not (streams / "a.jsonl.tokens").exists()
    same = {path.name: path.read_bytes() for path in alone.shards.glob("0*")}
    assert {name: bucket(apart)[name] for name in same} == same
    assert run(apart, no_client) == []
    shutil.rmtree(apart.home.root / "shards")
    shutil.rmtree(apart.home.root / "tokenized")
    (streams / "a.jsonl.json").unlink()
    parts = {path: path.stat().st_mtime_ns for path in streams.glob("a.jsonl.part-*")}
    assert run(apart, inline) == ["a.jsonl"]
    assert {path: path.stat().st_mtime_ns for path in parts} == parts
    damaged = next(streams.glob("a.jsonl.part-00001.tokens"))
    data = bytearray(damaged.read_bytes())
    data[3] ^= 1
    damaged.write_bytes(data)
    (streams / "a.jsonl.json").unlink()
    (apart.tokenized / "a.jsonl.json").unlink()
    with pytest.raises(DataError, match="part-00001.tokens is damaged.*run the command again, and it is remade"):
        apart.tokenize(inline)
    assert apart.tokenize(inline)[1] == ["a.jsonl"]
    assert damaged.read_bytes() != data


def test_without_a_place_for_the_shards_it_is_refused(alone: SmallDataset, inline: PoolFactory, monkeypatch, tmp_path):
    monkeypatch.setenv("OPENLM_EXCHANGE", f"file://{tmp_path}/exchange")
    with pytest.raises(ConfigError, match="set the recipe's shards_url"):
        alone.tokenize(inline)
