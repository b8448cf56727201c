"""OpenLM's shards: exports hold what ours hold, what OpenLM's scripts wrote is read, and what is broken is named."""

import ast
import contextlib
import gzip
import io
import json
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_dataset import SmallDataset, message_of

from openlm_pipeline.errors import DataError, IdentityError, MissingInputError, OpenLMError
from openlm_pipeline.pools import InProcess, Pool, PoolFactory
from openlm_pipeline.shards.dataset import ShardedDataset
from openlm_pipeline.shards.format import SampleFormat, write_shard
from openlm_pipeline.shards.openlm_formats import EOT, PAD, _parse_literal, read_shard
from openlm_pipeline.shards.shard_export import export_shards
from openlm_pipeline.storage.files import sha256_file

FORMATS = ("json.gz", "json", "txt")
SETTINGS: dict[str, Any] = {"seq_len": 3, "vocab_size": 50_432, "eot_id": 0}
Members = list[tuple[str, bytes]]


def silent(line: str) -> None:
    pass


@pytest.fixture
def made(three_files: SmallDataset, inline: PoolFactory) -> ShardedDataset:
    """A dataset of several shards, the last one shorter, with end-of-text tokens in it."""
    return ShardedDataset(three_files.run(inline).path)


def write_tar(path: Path, members: Members, end: bool = True) -> Path:
    """A tar as Python's own library, which OpenLM's writers use, makes it."""
    with tarfile.open(path, "w") as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
        cut = archive.offset
    if not end:
        path.write_bytes(path.read_bytes()[:cut])
    return path


def hashes(folder: Path) -> dict[str, str]:
    return {p.name: sha256_file(p) for p in folder.iterdir() if p.name != ".lock"}


@pytest.mark.parametrize("eot_as", ["id", "string"])
@pytest.mark.parametrize("format", FORMATS)
def test_an_export_holds_the_samples_of_the_dataset(
    format: Any, eot_as: Any, made: ShardedDataset, tmp_path: Path, inline: PoolFactory
) -> None:
    done = export_shards(made.folder, tmp_path / "out", inline, silent, format=format, eot_as=eot_as)
    facts = {k: done.facts[k] for k in ("shards", "samples", "tokens")}
    assert facts == {"shards": len(made.entries), "samples": len(made), "tokens": len(made) * 17}
    about = {"seq_len": 16, "vocab_size": made.info["tokenizer"]["vocab_size"]}
    # A wrong id for the string shows that the string is there.
    eot_id = made.info["eot_id"] if eot_as == "id" else 399
    rows = np.concatenate([read_shard(p, eot_id=eot_id, **about) for p in sorted((tmp_path / "out").glob("*.tar"))])
    expected = made.gather(np.arange(len(made)))
    assert (expected == made.info["eot_id"]).sum() > 20
    assert rows.dtype == expected.dtype
    assert np.array_equal(rows, np.where(expected == made.info["eot_id"], eot_id, expected))


@pytest.mark.parametrize("count_key", ["num_sequences", "num_chunks"])
def test_the_manifest_is_openlms(count_key: Any, made: ShardedDataset, tmp_path: Path, inline: PoolFactory) -> None:
    export_shards(made.folder, tmp_path / "out", inline, silent, count_key=count_key)
    text = (tmp_path / "out" / "manifest.jsonl").read_text()
    lines = [json.loads(line) for line in text.split("\n")[:-1]]  # OpenLM drops what is behind the last newline
    assert lines == [{"shard": f"{n:08d}", count_key: e.num_sequences} for n, e in enumerate(made.entries)]


def test_an_export_does_not_depend_on_workers_and_goes_on_where_it_stopped(
    made: ShardedDataset, tmp_path: Path, inline: PoolFactory, two_workers: PoolFactory, no_client: PoolFactory
) -> None:
    out = tmp_path / "out"
    export_shards(made.folder, out, inline, silent)
    first = hashes(out)
    export_shards(made.folder, tmp_path / "other", two_workers, silent)
    assert hashes(tmp_path / "other") == first

    class Stops(InProcess):
        def run(self, calls: Any, on_progress: Any) -> Iterator[tuple[str, Any]]:
            yield next(super().run(calls, on_progress))
            raise KeyboardInterrupt

    @contextlib.contextmanager
    def stops(report: Any) -> Iterator[Pool]:
        yield Stops()

    with pytest.raises(KeyboardInterrupt):
        export_shards(made.folder, tmp_path / "stopped", stops, silent)
    assert sorted(hashes(tmp_path / "stopped")) == ["00000000.tar", "export.json"]
    kept = (tmp_path / "stopped" / "00000000.tar").stat().st_ino
    assert not export_shards(made.folder, tmp_path / "stopped", inline, silent).reused
    assert hashes(tmp_path / "stopped") == first
    assert (tmp_path / "stopped" / "00000000.tar").stat().st_ino == kept

    assert export_shards(made.folder, out, no_client, silent).reused


def test_an_export_goes_into_no_other_data(made: ShardedDataset, tmp_path: Path, inline: PoolFactory) -> None:
    export_shards(made.folder, tmp_path / "out", inline, silent)
    before = hashes(tmp_path / "out")
    with pytest.raises(IdentityError) as error:
        export_shards(made.folder, tmp_path / "out", inline, silent, format="txt")
    message_of(error.value, str(tmp_path / "out"), "format json.gz -> txt")
    assert hashes(tmp_path / "out") == before
    with pytest.raises(IdentityError, match="holds shards that no export made"):
        export_shards(made.folder, made.folder, inline, silent)


GZIPPED = gzip.compress(b"[5, 6, 7, 8]")
MADE_BY_OPENLM: dict[str, tuple[Members, list[list[int]]]] = {
    "make_2048.py of August 2023": (
        [
            (f"{0:12d}.txt", b"[11, 12, '<|endoftext|>', 50276]"),
            (f"{1:12d}.txt", b"['<|endoftext|>', '<|endoftext|>', 1, 2]"),
        ],
        [[11, 12, 0, 50276], [0, 0, 1, 2]],
    ),
    "make_2048.py, newest": ([(f"{3:012d}.txt", b"[1, 2, 3, 4]")], [[1, 2, 3, 4]]),
    "tokenize_shuffle.py, keys of md5 in no order": (
        [
            ("f7c3bc1d808e04732adf679965ccc34c.json.gz", GZIPPED),
            ("0cc175b9c0f1b6a831c399e269772661.json.gz", gzip.compress(b"[0, 50256, -1, -2]")),
        ],
        [[5, 6, 7, 8], [0, 50256, 50431, 50430]],
    ),
    "the example data": ([("./shard/0.json", b"[9,8,7,6]\n")], [[9, 8, 7, 6]]),
    "strings in JSON": ([("0.JSON", json.dumps([EOT, PAD, 3, EOT]).encode())], [[0, 50282, 3, 0]]),
    "one of each": (
        [("c.txt", b'["<|endoftext|>", 1, 2, 3,]'), ("a.json", b"[1,1,1,1]"), ("b.json.gz", GZIPPED)],
        [[0, 1, 2, 3], [1, 1, 1, 1], [5, 6, 7, 8]],
    ),
}


@pytest.mark.parametrize("what", MADE_BY_OPENLM)
def test_what_openlms_scripts_write_is_read_in_its_order(what: str, tmp_path: Path) -> None:
    members, expected = MADE_BY_OPENLM[what]
    rows = read_shard(write_tar(tmp_path / "s.tar", members), pad_id=50282, **SETTINGS)
    assert rows.tolist() == expected
    assert rows.dtype == np.uint16


def test_our_own_shards_are_read_too(tmp_path: Path) -> None:
    samples = np.arange(40, dtype=np.uint32).reshape(10, 4) + 70_000
    write_shard(tmp_path / "s.tar", samples, 7, SampleFormat(4, "uint32"))
    rows = read_shard(tmp_path / "s.tar", **{**SETTINGS, "vocab_size": 100_000})
    assert rows.dtype == np.uint32 and np.array_equal(rows, samples)


def test_longer_samples_are_cut_only_on_demand(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "s.tar", [("0.json", b"[1,2,3,4,5,6]")])
    with pytest.raises(DataError, match=r"member 0.json: it has 6 ids, not seq_len \+ 1 = 4; its first ids can be"):
        read_shard(path, **SETTINGS)
    assert read_shard(path, trim=True, **SETTINGS).tolist() == [[1, 2, 3, 4]]


BROKEN: dict[str, tuple[str, bytes, str]] = {
    "short": ("0.json", b"[1,2,3]", "it has 3 ids, not seq_len + 1 = 4"),
    "empty list": ("0.json", b"[]", "it has 0 ids"),
    "empty": ("0.txt", b"", "it is not a Python list"),
    "no list": ("0.json", b'{"text": 1}', "it holds no list of ids but a dict"),
    "nested": ("0.json", b"[1,[2],3,4]", "'[2]' is no token id"),
    "nested literal": ("0.txt", b"[1,[2,'\"'],3,4]", "it is not a flat list of ids"),
    "a float": ("0.json", b"[1,2.0,3,4]", "'2.0' is no token id"),
    "a truth value": ("0.json", b"[1,true,3,4]", "'True' is no token id"),
    "a Python truth value": ("0.txt", b"[1,True,3,4]", "'True' is no token id"),
    "huge": ("0.json", b"[1,2,3,18446744073709551615]", "18446744073709551615 is no token id"),
    "huge literal": ("0.txt", b"[1,2,3,-9223372036854775809]", "is no token id"),
    "beyond the vocabulary": ("0.json", b"[1,2,3,50432]", "id 50432 is outside the vocabulary of 50432"),
    "too negative": ("0.json", b"[1,2,3,-50433]", "id -50433 is outside the vocabulary of 50432"),
    "an unknown string": ("0.txt", b"[1,'<|pause|>',3,4]", "'<|pause|>' is no token id"),
    "padding without an id": ("0.txt", b"[1,'<|pad|>',3,4]", "'<|pad|>' is no token id; say which id it has"),
    "cut JSON": ("0.json", b"[1,2,3", "unexpected end of data"),
    "cut gzip": ("0.json.gz", GZIPPED[:-3], "its gzip stream is cut"),
    "no gzip": ("0.json.gz", b"[1,2,3,4]", "incorrect header check"),
    "wrong checksum": ("0.json.gz", GZIPPED[:-8] + bytes(4) + GZIPPED[-4:], "incorrect data check"),
    "code": ("0.txt", b"__import__('os')", "it is not a Python list"),
    "deep": ("0.txt", b"-" * 500_000 + b"1", "it is not a"),
    "invalid UTF-8": ("0.txt", b"[1,2,3,'\xff']", "can't decode byte 0xff"),
    "an unknown extension": ("0.jpg", b"[1,2,3,4]", "its extension 'jpg' is none of json.gz, json, txt, npy"),
    "a cut array": ("0.npy", SampleFormat(4, "uint16").npy_header + b"1234", "not a whole list of integers"),
    "no array": ("0.npy", b"[1,2,3,4]", "magic string is not correct"),
    "objects": ("0.npy", SampleFormat(4, "uint16").npy_header.replace(b"<u2", b"|O8") + bytes(32), "not a whole list"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_member_that_is_no_sample_is_named(what: str, tmp_path: Path) -> None:
    name, data, problem = BROKEN[what]
    path = write_tar(tmp_path / "s.tar", [("fine.json", b"[1,2,3,4]"), (name, data)])
    with pytest.raises(DataError) as error:
        read_shard(path, **SETTINGS)
    message_of(error.value, f"shard {path}, member {name}", problem)


@pytest.fixture
def whole(tmp_path: Path) -> bytes:
    """The bytes of a tar of ten samples, without the padding behind its end mark."""
    members = [(f"{n}.json", json.dumps([n, 2, 3, 4]).encode()) for n in range(10)]
    return write_tar(tmp_path / "whole.tar", members).read_bytes()[: 22 * 512]


def test_a_tar_that_is_cut_anywhere_is_never_passed_off_as_whole(whole: bytes, tmp_path: Path) -> None:
    path = tmp_path / "s.tar"
    for cut in range(0, 20 * 512 + 1, 256):
        path.write_bytes(whole[:cut])
        with pytest.raises(DataError, match=f"shard {path}"):
            read_shard(path, **SETTINGS)
        if cut < 20 * 512:
            with pytest.raises(DataError, match=f"shard {path}"):
                read_shard(path, num_samples=10, **SETTINGS)
    # All ten samples are there, and only the end mark is missing, as make_2048.py may leave it.
    assert len(read_shard(path, num_samples=10, **SETTINGS)) == 10


def test_a_flipped_header_is_never_taken_for_the_end(whole: bytes, tmp_path: Path) -> None:
    path = tmp_path / "s.tar"
    for member in range(10):
        data = bytearray(whole)
        data[member * 1024 + 150] ^= 4  # in the header's checksum
        path.write_bytes(data)
        with pytest.raises(DataError, match=f"shard {path}"):
            read_shard(path, **SETTINGS)


def test_another_number_of_samples_than_promised_and_a_missing_shard_are_named(whole: bytes, tmp_path: Path) -> None:
    path = tmp_path / "s.tar"
    path.write_bytes(whole)
    with pytest.raises(DataError, match=f"shard {path} has 10 samples, but the manifest says 11"):
        read_shard(path, num_samples=11, **SETTINGS)
    with pytest.raises(MissingInputError, match="none.tar does not exist"):
        read_shard(tmp_path / "none.tar", **SETTINGS)


def outcome(parse: Callable[[bytes], Any], data: bytes) -> Any:
    try:
        value = parse(data)
    except (ValueError, SyntaxError):
        return "refused"
    return repr(value) if isinstance(value, list) else "refused"


@settings(deadline=None)
@given(
    st.lists(
        st.one_of(st.integers(-(2**63), 2**63 - 1), st.sampled_from([EOT, PAD, "", "it's", 'a "b"', "\\n", "é\n"])),
        max_size=8,
    ),
    st.sampled_from(["{}", " {} ", "{}\n", "{},", "[{}", "{}]"]),
)
def test_the_quick_way_to_read_a_python_list_gives_what_the_literal_parser_gives(values: list, around: str) -> None:
    data = around.format(repr(values)).encode()
    assert outcome(_parse_literal, data) == outcome(lambda d: ast.literal_eval(d.decode().strip()), data)


@settings(deadline=None, max_examples=200)
@given(data=st.data())
def test_damaged_bytes_give_samples_or_a_message(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = write_tar(
        tmp_path_factory.mktemp("fuzz") / "s.tar",
        [("0.json.gz", GZIPPED), ("1.txt", b"[1, '<|endoftext|>', 3, 4]"), ("2.json", b"[1,2,3,4]")],
    )
    content = bytearray(path.read_bytes()[: 8 * 512])
    for _ in range(data.draw(st.integers(1, 4))):
        block = data.draw(st.integers(0, 7)) * 512
        content[block + data.draw(st.one_of(st.integers(0, 60), st.integers(100, 265)))] = data.draw(
            st.integers(0, 255)
        )
    path.write_bytes(content)
    with contextlib.suppress(OpenLMError):
        rows = read_shard(path, **SETTINGS)
        assert rows.shape[1] == 4 and rows.max(initial=0) < 50_432
