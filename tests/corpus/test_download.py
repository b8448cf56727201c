"""A download is whole, checked and of one version, or it doesn't have its name; and it resumes where it stopped."""

import json
import shutil
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from faulty_server import DATA, OTHER, PART, WHOLE, Answer, FaultyServer, names, sha256

from openlm_pipeline.corpus.download import RemoteFile, download_files, expand_templates
from openlm_pipeline.corpus.download_sources import TransferError
from openlm_pipeline.errors import BusyError, ConfigError, DataError, MissingInputError, OpenLMError
from openlm_pipeline.storage.files import folder_lock


def test_templates_name_files_as_a_shell_does() -> None:
    targets = expand_templates(["https://h/train/{08..11}.jsonl.zst?key=1", "s3://b/{val,test}.jsonl", "hf://d/x%20y"])
    assert [t.name for t in targets] == [
        *(f"{i:02d}.jsonl.zst" for i in range(8, 12)),
        *("val.jsonl", "test.jsonl", "x%20y"),
    ]
    assert targets[1].url == "https://h/train/09.jsonl.zst?key=1"
    assert expand_templates(["https://h/x%20y.gz"])[0].name == "x y.gz"


@pytest.mark.parametrize(
    ("templates", "message"),
    [
        (["raw/00.jsonl"], "is not a URL"),
        (["zip://a.jsonl::https://h/b.zip"], "is not a URL"),
        (["https://h/{00..}.jsonl"], "are no range"),
        (["https://h/{00,01.jsonl"], "are no range"),
        (["https://h/{1..1000001}.jsonl"], "more than 1,000,000"),
        (["https://h/a%2F.."], "file name 'a/\\.\\.'"),
        (["https://h/{a,..}/b"], r"file name '\.\.'"),
        (["https://h/file?n={0..3}"], "two files would be named"),
        (["https://h/"], "file name ''"),
        (["https://h/.."], r"file name '\.\.'"),
        (["https://h/%2e%2e%2fetc"], r"file name '\.\./etc'"),
        (["https://h/a%5Cb"], "can't be used"),
        (["https://h/a%0Ab"], "can't be used"),
        (["s3://b/.lock"], "can't be used"),
        (["https://h/SHA256SUMS"], "can't be used"),
        (["https://h/a.part"], "can't be used"),
        (["https://[h/a"], "not valid"),
    ],
)
def test_a_template_that_cannot_be_used_is_explained(templates: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        download_files(templates, tmp_path / "new", report=print)
    assert not (tmp_path / "new").exists()


def test_files_come_whole_with_their_hashes_and_are_not_asked_for_again(
    server: FaultyServer, fetch: Callable[..., dict[str, RemoteFile]], tmp_path: Path
) -> None:
    server.files |= {f"/t/{i:02d}.jsonl": DATA[i : i * 100_000] for i in range(12)} | {"/t/00.jsonl": b""}
    made = fetch("/t/{00..11}.jsonl", "/a.jsonl")
    assert list(made) == [*(f"{i:02d}.jsonl" for i in range(12)), "a.jsonl"]
    for name, entry in made.items():
        assert (tmp_path / name).read_bytes() == server.files["/a.jsonl" if name == "a.jsonl" else f"/t/{name}"]
        assert entry.sha256 == sha256((tmp_path / name).read_bytes())
    assert names(tmp_path) == {*made, "downloads.json", "SHA256SUMS"}
    if shutil.which("sha256sum"):
        subprocess.run(["sha256sum", "--check", "--strict", "SHA256SUMS"], cwd=tmp_path, check=True)
    seen = len(server.requests)
    assert fetch("/t/{00..11}.jsonl", "/a.jsonl") == made and len(server.requests) == seen


def test_after_a_dropped_connection_only_the_rest_is_asked_for(
    server: FaultyServer, fetch: Callable[..., dict[str, RemoteFile]], tmp_path: Path
) -> None:
    server.answers["/a.jsonl"] = [Answer(cut_after=700_000), Answer(status=500), Answer(cut_after=1)]
    final, seen = tmp_path / "a.jsonl", []
    fetch(progress=lambda name, done, total: seen.append((name, done, total, final.exists())))
    assert server.ranges("/a.jsonl") == [None, "bytes=700000-", "bytes=700000-", "bytes=700001-"]
    assert final.read_bytes() == DATA and names(tmp_path) == WHOLE
    assert seen[-1] == ("a.jsonl", len(DATA), len(DATA), False)
    assert [done for _, done, _, _ in seen] == sorted(done for _, done, _, _ in seen)
    assert not any(visible for *_, visible in seen)


@pytest.mark.parametrize(
    ("second", "third"),
    [
        (Answer(ranges=False), []),
        (Answer(headers={"Content-Range": None}), [None]),
        (Answer(headers={"Content-Range": "bytes 0-1499999/1500000"}), [None]),
        (Answer(headers={"Content-Range": "bytes 700000-1499999/1500001"}), [None]),
        (
            Answer(
                headers={"Content-Range": "bytes 700000-799999/1500000", "Content-Length": "100000"}, cut_after=10**5
            ),
            ["bytes=800000-"],
        ),
    ],
    ids=["no ranges", "not described", "another part", "another length", "a piece of the rest"],
)
def test_what_a_server_sends_instead_of_the_rest_is_never_taken_for_it(
    second: Answer,
    third: list[str | None],
    server: FaultyServer,
    fetch: Callable[..., dict[str, RemoteFile]],
    tmp_path: Path,
) -> None:
    server.answers["/a.jsonl"] = [Answer(cut_after=700_000), second]
    fetch()
    assert (tmp_path / "a.jsonl").read_bytes() == DATA
    assert server.ranges("/a.jsonl") == [None, "bytes=700000-", *third]


@pytest.mark.parametrize("if_range", [True, False])
def test_two_versions_are_never_joined(
    if_range: bool, server: FaultyServer, fetch: Callable[..., dict[str, RemoteFile]], tmp_path: Path
) -> None:
    server.answers["/a.jsonl"] = [Answer(cut_after=700_000)]
    with pytest.raises(TransferError):
        fetch(retries=0)
    assert names(tmp_path) == PART
    server.files["/a.jsonl"] = OTHER
    server.answers["/a.jsonl"] = [Answer(if_range=if_range)]
    made = fetch()
    assert (tmp_path / "a.jsonl").read_bytes() == OTHER and made["a.jsonl"].sha256 == sha256(OTHER)
    assert server.ranges("/a.jsonl")[1] == "bytes=700000-"


def test_a_file_that_got_shorter_is_begun_anew(
    server: FaultyServer, fetch: Callable[..., dict[str, RemoteFile]], tmp_path: Path
) -> None:
    server.answers["/a.jsonl"] = [Answer(cut_after=700_000), Answer(if_range=False)]
    server.etags["/a.jsonl"] = '"never changes"'
    with pytest.raises(TransferError):
        fetch(retries=0)
    server.files["/a.jsonl"] = OTHER[:1000]
    fetch()
    assert server.ranges("/a.jsonl") == [None, "bytes=700000-", None]
    assert (tmp_path / "a.jsonl").read_bytes() == OTHER[:1000]


@pytest.mark.parametrize(
    ("etag", "modified", "resumes"), [(None, None, False), ('W/"1"', None, False), (None, "x", True)]
)
def test_a_version_that_cannot_be_told_apart_is_begun_anew(
    etag: str | None,
    modified: str | None,
    resumes: bool,
    server: FaultyServer,
    fetch: Callable[..., dict[str, RemoteFile]],
) -> None:
    headers = {"ETag": etag, "Last-Modified": modified}
    server.answers["/a.jsonl"] = [Answer(cut_after=700_000, headers=headers), Answer(headers=headers, if_range=False)]
    assert fetch()["a.jsonl"].sha256 == sha256(DATA)
    assert server.ranges("/a.jsonl")[1] == ("bytes=700000-" if resumes else None)


def test_attempts_without_a_new_byte_are_counted(
    server: FaultyServer, fetch: Callable[..., dict[str, RemoteFile]], tmp_path: Path
) -> None:
    server.answers["/a.jsonl"] = [Answer(cut_after=100_000) for _ in range(10)]
    fetch(retries=1)  # every attempt adds something
    assert len(server.requests) == 11 and (tmp_path / "a.jsonl").read_bytes() == DATA
    server.files["/b.jsonl"] = DATA
    server.answers["/b.jsonl"] = [Answer(cut_after=100_000, ranges=False) for _ in range(50)]
    with pytest.raises(TransferError, match=r"1 of 1 files failed.*\n  b\.jsonl: .*/b\.jsonl: the connection broke"):
        fetch("/b.jsonl", retries=3)
    assert len(server.ranges("/b.jsonl")) == 4 and "b.jsonl" not in names(tmp_path)


def test_a_length_that_is_not_reached_or_not_said_is_not_whole(
    server: FaultyServer, fetch: Callable[..., dict[str, RemoteFile]], tmp_path: Path
) -> None:
    close = {"Content-Length": None, "Connection": "close"}
    for answer, error in (
        (Answer(headers={"Content-Length": str(len(DATA) + 1)}, cut_after=len(DATA)), TransferError),
        (Answer(headers=close, cut_after=len(DATA)), DataError),
        (Answer(chunked=True, cut_after=len(DATA)), TransferError),
    ):
        server.answers["/a.jsonl"] = [answer]
        with pytest.raises(error):
            fetch(retries=0)
        assert "a.jsonl" not in names(tmp_path)
        for name in names(tmp_path):
            (tmp_path / name).unlink()
    server.answers["/a.jsonl"] = [Answer(chunked=True)]
    assert fetch()["a.jsonl"].size_bytes == len(DATA) and names(tmp_path) == WHOLE


def test_a_silent_server_is_left_and_asked_again(
    server: FaultyServer, fetch: Callable[..., dict[str, RemoteFile]], tmp_path: Path
) -> None:
    held = threading.Event()
    server.answers["/a.jsonl"] = [Answer(cut_after=1 << 19, hold=held)]
    fetch(timeout_seconds=0.3)
    held.set()
    assert (tmp_path / "a.jsonl").read_bytes() == DATA and server.ranges("/a.jsonl") == [None, f"bytes={1 << 19}-"]


@pytest.mark.parametrize(
    ("answer", "error", "message"),
    [
        (Answer(status=404), MissingInputError, "404 Not Found. Check the address"),
        (Answer(status=403), MissingInputError, "403 Forbidden. Access is refused"),
        (Answer(status=401), MissingInputError, "401 Unauthorized. Access needs credentials"),
        (Answer(headers={"Content-Type": "text/html; charset=utf-8"}), DataError, "sends a web page"),
        (Answer(headers={"Content-Encoding": "gzip"}), DataError, "insists on sending it as gzip"),
        (Answer(status=302, headers={"Location": "file:///etc/passwd"}), ConfigError, "not a valid web address"),
    ],
)
def test_one_failure_is_clear_final_and_stops_no_other(
    answer: Answer,
    error: type[OpenLMError],
    message: str,
    server: FaultyServer,
    fetch: Callable[..., dict[str, RemoteFile]],
    tmp_path: Path,
) -> None:
    server.files |= {"/b.jsonl": OTHER, "/c.jsonl": DATA}
    server.answers["/b.jsonl"] = [answer]
    with pytest.raises(OpenLMError, match=rf"1 of 3 files failed.*\n  b\.jsonl: .*{message}") as failure:
        fetch("/{a,b,c}.jsonl")
    assert type(failure.value) is error and len(server.ranges("/b.jsonl")) == 1
    assert names(tmp_path) == {*WHOLE, "c.jsonl"}


def test_hosts_that_do_not_answer_are_named(tmp_path: Path) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        for url, message in (
            ("http://no-such-host.invalid/a", r"host no-such-host\.invalid can't be found"),
            (f"http://127.0.0.1:{closed.getsockname()[1]}/a", "no answer: .*refused"),
        ):
            with pytest.raises(TransferError, match=message):
                download_files([url], tmp_path, retries=0, report=print)


def test_secrets_of_an_address_are_never_shown_or_kept(
    server: FaultyServer, fetch: Callable[..., dict[str, RemoteFile]], tmp_path: Path
) -> None:
    server.answers["/a.jsonl"] = [Answer(cut_after=700_000), Answer(status=503)]
    lines: list[str] = []
    with pytest.raises(OpenLMError) as failure:
        fetch("/{a,none}.jsonl?token=hunter2", retries=0, report=lines.append)
    fetch("/a.jsonl?token=hunter2", report=lines.append)
    with pytest.raises(ConfigError, match="holds a password") as refused:
        download_files(["https://user:hunter2@h/a"], tmp_path, report=lines.append)
    texts = [*lines, str(failure.value), str(refused.value), (tmp_path / "downloads.json").read_text()]
    assert not any("hunter2" in text for text in texts)


def test_one_process_at_a_time(fetch: Callable[..., dict[str, RemoteFile]], tmp_path: Path) -> None:
    with folder_lock(tmp_path, "downloading"), pytest.raises(BusyError, match="already downloading"):
        fetch()


def test_a_disk_without_room_ends_all_at_once(
    server: FaultyServer, fetch: Callable[..., dict[str, RemoteFile]], tmp_path: Path
) -> None:
    server.answers["/a.jsonl"] = [Answer(headers={"Content-Length": str(10**18)}, cut_after=1)]
    server.files["/b.jsonl"] = OTHER
    with pytest.raises(OpenLMError, match=r"(?s)bytes are missing, more than the disk has free.*b\.jsonl: stopped"):
        fetch("/{a,b}.jsonl", parallel=1)
    assert "b.jsonl" not in names(tmp_path) and not server.ranges("/b.jsonl")


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A file system on a server that speaks S3."""
    moto, s3fs = pytest.importorskip("moto.server"), pytest.importorskip("s3fs")
    running = moto.ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    running.start()
    host, port = running.get_host_and_port()
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "x")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    s3fs.S3FileSystem.clear_instance_cache()  # instances keep the address of their first server
    yield s3fs.S3FileSystem()
    s3fs.S3FileSystem.clear_instance_cache()
    running.stop()


def test_object_stores_resume_within_one_version(s3: Any, tmp_path: Path) -> None:
    bucket = tmp_path.name.replace("_", "-")
    s3.mkdir(bucket)
    s3.pipe({f"{bucket}/a.jsonl": DATA, f"{bucket}/b.jsonl": OTHER})
    url = f"s3://{bucket}/{{a,b}}.jsonl"
    made = download_files([url], tmp_path, report=print)
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).unlink()
        version = {"source": f"s3://{bucket}/{name}", "size_bytes": len(DATA), "etag": made[name].etag}
        (tmp_path / f"{name}.part.json").write_text(json.dumps(version))
        # What is there already is marked, to see whether it is kept.
        (tmp_path / f"{name}.part").write_bytes(b"kept" + DATA[4:1000])
    s3.pipe(f"{bucket}/b.jsonl", OTHER[::-1])
    download_files([url], tmp_path, report=print)
    assert (tmp_path / "a.jsonl").read_bytes() == b"kept" + DATA[4:]
    assert (tmp_path / "b.jsonl").read_bytes() == OTHER[::-1]
    with pytest.raises(MissingInputError, match=f"s3://{bucket}/none.jsonl does not exist"):
        download_files([f"s3://{bucket}/none.jsonl"], tmp_path, report=print)


def test_base_names_may_repeat(server: FaultyServer, fetch: Callable[..., dict[str, RemoteFile]], tmp_path: Path):
    """FineWeb's and Dolma's layouts: a folder per crawl, the same names in each."""
    for dump in ("CC-2023-06", "CC-2024-10"):
        server.files |= {f"/data/{dump}/{n:03d}.parquet": DATA + dump.encode() for n in range(2)}
    made = fetch("/data/{CC-2023-06,CC-2024-10}/{000..001}.parquet", parallel=2)
    assert list(made) == [f"CC-{dump}/{n:03d}.parquet" for dump in ("2023-06", "2024-10") for n in range(2)]
    assert (tmp_path / "CC-2024-10" / "001.parquet").read_bytes() == DATA + b"CC-2024-10"
    checked = subprocess.run(["sha256sum", "-c", "SHA256SUMS"], cwd=tmp_path, check=True, capture_output=True)
    assert checked.stdout.count(b": OK") == 4
    asked = len(server.requests)
    assert fetch("/data/{CC-2023-06,CC-2024-10}/{000..001}.parquet") == made and len(server.requests) == asked


def test_a_list_names_files_below_what_they_have_in_common(server: FaultyServer, tmp_path: Path) -> None:
    """RedPajama-V2's layout: a list of URLs, one per line."""
    paths = [f"documents/2023-{week}/{n:04d}/en_head.json.gz" for week in ("06", "14") for n in range(2)]
    server.files |= {f"/v1/{path}": DATA for path in paths}
    server.files["/urls.txt"] = "\n".join(["# urls", "", *(f"{server.url}/v1/{path}" for path in paths)]).encode()
    names = [path.removeprefix("documents/") for path in paths]
    assert [t.name for t in expand_templates([f"@{server.url}/urls.txt"])] == names
    (tmp_path / "urls.txt").write_text(f"{server.url}/v1/documents/2023-{{06,14}}/{{0000..0001}}/en_head.json.gz\n")
    made = download_files([f"@{tmp_path}/urls.txt"], tmp_path / "raw", report=print)
    assert list(made) == names and (tmp_path / "raw" / names[3]).read_bytes() == DATA
    (tmp_path / "urls.txt").write_text("# none\n")
    with pytest.raises(MissingInputError, match="names no files"):
        expand_templates([f"@{tmp_path}/urls.txt"])
    with pytest.raises(MissingInputError, match=r"none\.txt can't be read"):
        expand_templates([f"@{tmp_path}/none.txt"])


def test_one_name_from_two_templates_is_told_apart_by_what_they_do_not_share() -> None:
    templates = ["https://h/data/en/{00..01}.zst", "https://h/data/de/{00..01}.zst?key=1", "https://h/data/en/00.zst"]
    assert [t.name for t in expand_templates(templates)] == [f"{x}/0{n}.zst" for x in ("en", "de") for n in range(2)]
    assert [t.name for t in expand_templates(["https://g/00.zst", "https://h/00.zst"])] == ["g/00.zst", "h/00.zst"]


def test_what_was_fetched_under_its_base_name_keeps_it(
    server: FaultyServer, fetch: Callable[..., dict[str, RemoteFile]], tmp_path: Path
) -> None:
    server.files |= {"/train/00.jsonl": DATA, "/val/01.jsonl": OTHER}
    fetch("/train/00.jsonl", "/val/01.jsonl")
    assert list(fetch("/{train/00,val/01}.jsonl")) == ["00.jsonl", "01.jsonl"]
    assert not (tmp_path / "train").exists()


def test_wildcards_of_a_store_are_listed(s3: Any, tmp_path: Path) -> None:
    bucket = tmp_path.name.replace("_", "-")
    s3.mkdir(bucket)
    s3.pipe({f"{bucket}/data/{dump}/{n}.parquet": DATA for dump in ("a", "b") for n in range(2)})
    names = ["a/0.parquet", "a/1.parquet", "b/0.parquet", "b/1.parquet"]
    for template in (f"s3://{bucket}/data/*/*.parquet", f"s3://{bucket}/data/{{a,b}}/*.parquet"):
        assert [t.name for t in expand_templates([template])] == names
    assert [t.name for t in expand_templates([f"s3://{bucket}/data/**"])] == names
    made = download_files([f"s3://{bucket}/data/*/*.parquet"], tmp_path, report=print)
    assert (tmp_path / "b/1.parquet").read_bytes() == DATA and list(made) == names
    with pytest.raises(MissingInputError, match=rf"there is no file s3://{bucket}/data/\*\.zst"):
        expand_templates([f"s3://{bucket}/data/*.zst"])
