"""Files fetched and sent through a faulty network: whole, or an error that says why."""

import hashlib
import sys
from pathlib import Path

import numpy as np
import pytest
from faulty_s3 import CUT, DROP, FLIP, FLIP_SENT, SHORT, STALL, Bucket

from openlm_pipeline.errors import ConfigError, DataError, MissingInputError
from openlm_pipeline.storage import remote

DATA = np.random.default_rng(0).bytes(300_000)
SHA256 = hashlib.sha256(DATA).hexdigest()


@pytest.fixture
def local(tmp_path: Path) -> Path:
    path = tmp_path / "data.bin"
    path.write_bytes(DATA)
    return path


def leftovers(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


@pytest.mark.parametrize("fault", [CUT, SHORT, FLIP, STALL, "500", "503"])
@pytest.mark.parametrize("protocol", ["s3", "http"])
def test_a_fetch_that_meets_a_fault_once_ends_whole(bucket: Bucket, tmp_path: Path, fault: str, protocol: str) -> None:
    bucket.put("data.bin", DATA)
    url = bucket.url if protocol == "s3" else bucket.http_url
    bucket.faults.set(fault)
    remote.download(f"{url}/data.bin", tmp_path / "got", size=len(DATA), sha256=SHA256)
    assert bucket.faults.met == 1
    assert (tmp_path / "got").read_bytes() == DATA
    assert leftovers(tmp_path) == ["got"]


@pytest.mark.parametrize("fault", [CUT, SHORT, FLIP, "500"])
@pytest.mark.parametrize("protocol", ["s3", "http"])
def test_a_fetch_that_never_comes_whole_is_an_error_and_leaves_nothing(
    bucket: Bucket, tmp_path: Path, fault: str, protocol: str
) -> None:
    bucket.put("data.bin", DATA)
    url = f"{bucket.url if protocol == 's3' else bucket.http_url}/data.bin"
    bucket.faults.set(fault, 10**6)
    with pytest.raises(DataError, match=url):
        remote.download(url, tmp_path / "got", size=len(DATA), sha256=SHA256)
    assert leftovers(tmp_path) == []


def test_what_was_expected_and_what_came_is_said(bucket: Bucket, tmp_path: Path) -> None:
    bucket.put("data.bin", DATA)
    with pytest.raises(DataError, match=r"has 300000 bytes, but 300001 are expected"):
        remote.download(f"{bucket.url}/data.bin", tmp_path / "got", size=len(DATA) + 1)
    with pytest.raises(DataError, match=f"has sha256 {SHA256}, but {'0' * 64} is expected"):
        remote.download(f"{bucket.url}/data.bin", tmp_path / "got", sha256="0" * 64)
    with pytest.raises(MissingInputError, match=rf"{bucket.url}/nothing does not exist"):
        remote.download(f"{bucket.url}/nothing", tmp_path / "got")
    with pytest.raises(MissingInputError, match=r"nothing does not exist"):
        remote.download(f"{bucket.http_url}/nothing", tmp_path / "got")


@pytest.mark.parametrize("fault", [DROP, "500", "503"])
def test_an_upload_that_meets_a_fault_once_ends_whole(bucket: Bucket, local: Path, fault: str) -> None:
    bucket.faults.set(fault, method="PUT")
    remote.upload(local, f"{bucket.url}/folder/data.bin")
    assert bucket.faults.met == 1
    assert bucket.read("folder/data.bin") == DATA
    assert remote.holds(f"{bucket.url}/folder/data.bin", size=len(DATA), sha256=SHA256)


@pytest.mark.parametrize("fault", [DROP, FLIP_SENT, "500"])
def test_an_upload_that_never_gets_through_is_an_error_and_shows_nothing(
    bucket: Bucket, local: Path, fault: str
) -> None:
    bucket.faults.set(fault, 10**6, method="PUT")
    with pytest.raises(DataError, match=rf"{local} can't be uploaded to {bucket.url}/data.bin"):
        remote.upload(local, f"{bucket.url}/data.bin")
    assert bucket.names() == set()


@pytest.mark.parametrize("fault", [DROP, "500"])
@pytest.mark.parametrize("times", [1, 10**6])
def test_an_upload_in_parts_is_whole_or_does_not_show(
    bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str, times: int
) -> None:
    monkeypatch.setattr(remote, "_PART_BYTES", 5 << 20)  # the smallest of S3
    path = tmp_path / "large.bin"
    path.write_bytes(DATA * 40)
    bucket.faults.set(fault, times, method="PUT")
    if times == 1:
        remote.upload(path, f"{bucket.url}/large.bin")
        assert bucket.read("large.bin") == DATA * 40
    else:
        with pytest.raises(DataError, match="can't be uploaded"):
            remote.upload(path, f"{bucket.url}/large.bin")
        assert bucket.names() == set()


def test_a_store_holds_what_was_uploaded_there_and_nothing_else(bucket: Bucket, local: Path) -> None:
    for url in (f"{bucket.url}/data.bin", "memory://folder/data.bin", f"file://{local.parent}/folder/data.bin"):
        assert not remote.holds(url, size=len(DATA), sha256=SHA256)
        remote.upload(local, url)
        assert remote.holds(url, size=len(DATA), sha256=SHA256)
        assert not remote.holds(url, size=len(DATA), sha256="0" * 64)
        assert not remote.holds(url, size=len(DATA) - 1, sha256=SHA256)
    assert leftovers(local.parent / "folder") == ["data.bin"]
    with pytest.raises(ConfigError, match="HTTP servers are for reading"):
        remote.upload(local, f"{bucket.http_url}/data.bin")


def test_denied_access_and_missing_credentials_are_named(
    bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket.put("data.bin", DATA)
    bucket.faults.set("403", 10**6)
    with pytest.raises(ConfigError, match="Check the address and the credentials"):
        remote.download(f"{bucket.url}/data.bin", tmp_path / "got", size=len(DATA))


def test_secrets_in_a_url_are_not_told(bucket: Bucket, tmp_path: Path) -> None:
    for url in (f"{bucket.http_url}/nothing?X-Amz-Signature=a-secret", "s3://key:a-secret@bucket/x"):
        with pytest.raises((MissingInputError, ConfigError)) as caught:
            remote.download(url, tmp_path / "got")
        error: BaseException | None = caught.value
        while error is not None:
            assert "a-secret" not in str(error)
            error = error.__cause__
    bucket.faults.set("500", 10**6, method="GET")
    with pytest.raises(DataError) as failed:
        remote.download(f"{bucket.http_url}/x?X-Amz-Signature=a-secret", tmp_path / "got")
    assert "a-secret" not in str(failed.value) and failed.value.__cause__ is None


def test_without_the_s3_library_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from fsspec.registry import _registry

    monkeypatch.setitem(sys.modules, "s3fs", None)
    monkeypatch.delitem(_registry, "s3", raising=False)
    with pytest.raises(ConfigError, match=r"pip install 'openlm-pipeline\[s3\]'"):
        remote.download("s3://bucket/x", tmp_path / "got")
