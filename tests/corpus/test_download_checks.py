"""Which files are trusted: checksums, records, parts and files of other origin."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from faulty_server import DATA, OTHER, WHOLE, Answer, FaultyServer, names, sha256

from openlm_pipeline.corpus.download import RemoteFile
from openlm_pipeline.corpus.download_sources import TransferError
from openlm_pipeline.errors import ConfigError, DataError, IdentityError, MissingInputError


@pytest.mark.parametrize("algorithm", ["sha256", "md5"])
@pytest.mark.parametrize("remote", [True, False])
def test_checksums_decide(
    algorithm: str,
    remote: bool,
    server: FaultyServer,
    fetch: Callable[..., dict[str, RemoteFile]],
    tmp_path_factory: pytest.TempPathFactory,
    tmp_path: Path,
) -> None:
    server.files["/b.jsonl"] = OTHER
    right, wrong = hashlib.new(algorithm, DATA).hexdigest(), hashlib.new(algorithm, b"").hexdigest()
    text = f"# a comment\n{right} *./train/a.jsonl\n{wrong}  b.jsonl\n{wrong}  other.jsonl\n"
    server.files["/sums"] = text.encode()
    sums = tmp_path_factory.mktemp("sums") / "sums.txt"
    sums.write_text(text)
    where = f"{server.url}/sums" if remote else str(sums)
    found = hashlib.new(algorithm, OTHER).hexdigest()
    with pytest.raises(DataError, match=rf"b\.jsonl: its {algorithm} is {found} and should be {wrong}"):
        fetch("/{a,b}.jsonl", checksums=where)
    assert names(tmp_path) == WHOLE
    seen = len(server.ranges("/a.jsonl"))
    fetch("/a.jsonl", checksums=where)
    assert len(server.ranges("/a.jsonl")) == seen


def test_a_checksum_file_must_have_every_file(
    server: FaultyServer, fetch: Callable[..., dict[str, RemoteFile]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    sums = tmp_path_factory.mktemp("sums") / "sums.txt"
    digest, other = sha256(DATA), sha256(OTHER)
    for text, message in (
        (f"{digest}  b.jsonl\n", "has no checksum for a.jsonl"),
        (f"{digest}  x/a.jsonl\n{other}  y/a.jsonl\n", "has no checksum for a.jsonl"),
        (f"{digest}  a.jsonl\n{other}  a.jsonl\n", "several different checksums"),
        ("hello\n", "line 1 is not a checksum line"),
        ("", "has no checksums"),
    ):
        sums.write_text(text)
        with pytest.raises(ConfigError, match=message):
            fetch(checksums=str(sums))
    with pytest.raises(MissingInputError, match=r"none\.txt can't be read"):
        fetch(checksums=str(sums.with_name("none.txt")))
    assert not server.requests
    sums.write_text(f"{other}  val/a.jsonl\nSHA256 (train/a.jsonl) = {digest.upper()}\n")
    server.files["/train/a.jsonl"] = DATA
    assert fetch("/train/a.jsonl", checksums=str(sums))["a.jsonl"].sha256 == digest


def test_a_damaged_part_is_found_by_its_checksum_and_removed(
    server: FaultyServer,
    fetch: Callable[..., dict[str, RemoteFile]],
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    server.answers["/a.jsonl"] = [Answer(cut_after=700_000)]
    with pytest.raises(TransferError):
        fetch(retries=0)
    part = tmp_path / "a.jsonl.part"
    part.write_bytes(b"\0" + part.read_bytes()[1:])
    sums = tmp_path_factory.mktemp("sums") / "sums.txt"
    sums.write_text(f"{sha256(DATA)}  a.jsonl\n")
    with pytest.raises(DataError, match="should be"):
        fetch(checksums=str(sums))
    assert not names(tmp_path)
    fetch(checksums=str(sums))
    assert (tmp_path / "a.jsonl").read_bytes() == DATA


def test_a_part_of_unknown_origin_is_not_used(
    server: FaultyServer, fetch: Callable[..., dict[str, RemoteFile]], tmp_path: Path
) -> None:
    version = {"source": f"{server.url}/b.jsonl", "size_bytes": len(DATA), "etag": server.etag("/a.jsonl")}
    too_long = {**version, "source": f"{server.url}/a.jsonl", "size_bytes": 999}
    for description in (None, "{", json.dumps(version), json.dumps(too_long)):
        (tmp_path / "a.jsonl.part").write_bytes(OTHER[:1000])
        if description:
            (tmp_path / "a.jsonl.part.json").write_text(description)
        fetch()
        assert (tmp_path / "a.jsonl").read_bytes() == DATA and names(tmp_path) == WHOLE
        (tmp_path / "a.jsonl").unlink()
    assert server.ranges("/a.jsonl") == [None] * 4


def test_a_file_from_elsewhere_is_neither_trusted_nor_lost(
    server: FaultyServer,
    fetch: Callable[..., dict[str, RemoteFile]],
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    final, sums = tmp_path / "a.jsonl", tmp_path_factory.mktemp("sums") / "sums.txt"
    sums.write_text(f"{sha256(DATA)}  a.jsonl\n")
    final.write_bytes(OTHER)
    with pytest.raises(IdentityError, match="was not fetched by this command"):
        fetch()
    with pytest.raises(DataError, match="was not fetched by this command"):
        fetch(checksums=str(sums))
    assert final.read_bytes() == OTHER
    final.write_bytes(DATA)
    assert fetch(checksums=str(sums))["a.jsonl"].sha256 == sha256(DATA)
    server.files["/mirror/a.jsonl"] = OTHER
    with pytest.raises(IdentityError, match=r"was fetched from http.*/a\.jsonl, not from http.*/mirror/a\.jsonl"):
        fetch("/mirror/a.jsonl")
    assert fetch("/mirror/a.jsonl", checksums=str(sums))["a.jsonl"].sha256 == sha256(DATA)
    assert final.read_bytes() == DATA and not server.requests


def test_damaged_files_are_fetched_again(fetch: Callable[..., dict[str, RemoteFile]], tmp_path: Path) -> None:
    fetch()
    final, lines = tmp_path / "a.jsonl", []
    final.write_bytes(DATA[:-1])
    fetch(report=lines.append)
    assert final.read_bytes() == DATA and "damaged" in lines[0]
    final.write_bytes(DATA[:-1] + b"\0")
    fetch(verify=True)
    assert final.read_bytes() == DATA


def test_the_publishers_own_checksum_file_keeps_its_lines(
    server: FaultyServer, fetch: Callable[..., dict[str, RemoteFile]], tmp_path: Path
) -> None:
    sums = tmp_path / "SHA256SUMS"
    sums.write_text(f"# from the mirror\n{sha256(DATA)}  a.jsonl\n{sha256(OTHER)}  b.jsonl\n")
    fetch(checksums=str(sums))
    assert sums.read_text() == f"# from the mirror\n{sha256(OTHER)}  b.jsonl\n{sha256(DATA)}  a.jsonl\n"
