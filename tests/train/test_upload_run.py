"""A run's copy at a URL: whole beside training, fetched by a machine that has nothing, never in the way of training."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from small_run import SmallRun

from openlm_pipeline.checkpoints.folders import COMPLETE, list_checkpoints, read_checkpoint, verify
from openlm_pipeline.checkpoints.reading import load_model
from openlm_pipeline.errors import ConfigError, IdentityError
from openlm_pipeline.runs import upload
from openlm_pipeline.runs.folder import RunFolder
from openlm_pipeline.runs.upload import Uploads
from openlm_pipeline.storage.files import sha256_file
from openlm_pipeline.storage.remote import upload as put

ROTATING = ("execution.checkpoint_every=512", "execution.keep_checkpoints=1")


def there(store: Path) -> RunFolder:
    return RunFolder(store / "small" / "v1")


def contents(folder: Path) -> dict[str, str]:
    return {p.relative_to(folder).as_posix(): sha256_file(p) for p in folder.rglob("*") if p.is_file()}


def checkpoints(run: RunFolder) -> dict[int, str | None]:
    found = list_checkpoints(run.checkpoints, run.fingerprint, warn=pytest.fail)
    for checkpoint in found:
        verify(checkpoint)
    return {c.step: c.milestone for c in found}


@pytest.fixture(scope="module")
def uploaded(tmp_path_factory: pytest.TempPathFactory) -> SmallRun:
    """Milestones at 4 and 8, a rotating checkpoint at 6, all at `store` as well. Copy it before changing it."""
    small = SmallRun(tmp_path_factory.mktemp("uploaded"), (4, 8))
    small.train(f"execution.upload_to={store_of(small).as_uri()}", *ROTATING)
    return small


def store_of(small: SmallRun) -> Path:
    return small.recipe.parent / "store"


@pytest.fixture
def store(uploaded: SmallRun, tmp_path: Path) -> Path:
    return Path(shutil.copytree(store_of(uploaded), tmp_path / "store"))


def test_all_of_a_run_is_there_when_it_ends(uploaded: SmallRun):
    copy = there(store_of(uploaded))
    assert checkpoints(copy) == {4: "t1024", 6: None, 8: "t2048"} == uploaded.steps_on_disk()
    assert contents(copy.checkpoints) == contents(uploaded.run.checkpoints)  # and nothing that is outdated
    assert copy.read_metrics() == uploaded.run.read_metrics()
    assert copy.read_outcome()["status"] == "completed"


def test_a_machine_without_checkpoints_goes_on_from_those_there(uploaded: SmallRun, store: Path, tmp_path: Path):
    fresh = SmallRun(tmp_path / "fresh", (4, 8))
    there(store).attention_file.write_text('{"H100": ["flash"]}')
    fresh.train("milestones=[1024,2048,2560]", f"execution.upload_to={store}", *ROTATING)
    assert fresh.steps_on_disk() == {4: "t1024", 8: "t2048", 10: "t2560"}
    assert [s for s in fresh.losses() if s > 8] == [9, 10]
    assert {s: v for s, v in fresh.losses().items() if s <= 8} == uploaded.losses()  # the metrics came along
    assert fresh.run.attention_file.read_text() == '{"H100": ["flash"]}'  # so that training there has the same kernel
    assert checkpoints(there(store)) == {4: "t1024", 6: None, 8: "t2048", 10: "t2560"}


def test_what_is_damaged_there_is_named_and_the_one_before_used(store: Path, uploaded: SmallRun, tmp_path: Path, capfd):
    (part,) = (there(store).checkpoints / "step-00000008").glob("*.distcp")
    data = bytearray(part.read_bytes())
    data[len(data) // 2] ^= 1
    part.write_bytes(data)
    fresh = SmallRun(tmp_path / "fresh", (4, 8))
    fresh.train(f"execution.upload_to={store}")
    out = capfd.readouterr().out
    assert "step-00000008 is not fetched" in out and part.name in out
    assert "resumed from step-00000006" in out
    made, expected = (
        load_model(read_checkpoint(s.run.checkpoints / "step-00000008")).state_dict() for s in (fresh, uploaded)
    )
    assert all(torch.equal(made[name], expected[name]) for name in expected)
    assert checkpoints(there(store))[8] == "t2048"  # sent anew


def test_a_copy_without_its_mark_is_not_used_and_is_completed(store: Path, uploaded: SmallRun, tmp_path: Path, capfd):
    (there(store).checkpoints / "step-00000008" / COMPLETE).unlink()
    (there(store).checkpoints / "step-00000006" / COMPLETE).unlink()
    fresh = SmallRun(tmp_path / "fresh", (4, 8))
    fresh.train(f"execution.upload_to={store}")
    assert "resumed from step-00000004" in capfd.readouterr().out
    assert checkpoints(there(store)) == {4: "t1024", 8: "t2048"}


def test_what_is_there_is_not_sent_again(uploaded: SmallRun, store: Path):
    folder = there(store)
    before = {p: p.stat().st_mtime_ns for p in folder.checkpoints.rglob("*")}
    uploads = Uploads(uploaded.run, f"{store}/small/v1", keep=1, warn=pytest.fail, pause_seconds=0)
    for checkpoint in list_checkpoints(uploaded.run.checkpoints, uploaded.run.fingerprint, pytest.fail):
        uploads.add(checkpoint)
    uploads.finish()
    assert {p: p.stat().st_mtime_ns for p in folder.checkpoints.rglob("*")} == before


def test_another_run_there_is_refused(uploaded: SmallRun, store: Path, tmp_path: Path):
    other = SmallRun(tmp_path / "other", (4, 8))
    before = contents(store)
    with pytest.raises(IdentityError, match="store/small/v1 holds another run"):
        other.train("seed=1", f"execution.upload_to={store}")
    assert other.run.read_outcome()["status"] == "failed"
    assert contents(store) == before


def test_a_store_that_fails_stops_no_training_and_is_tried_again(uploaded: SmallRun, tmp_path: Path):
    """Where the folder of checkpoints should be is a file; when it is gone, the same copies are made."""
    blocked = tmp_path / "store" / "small" / "v1"
    blocked.mkdir(parents=True)
    (blocked / "checkpoints").write_text("in the way")
    warnings: list[str] = []
    uploads = Uploads(uploaded.run, str(blocked), keep=1, warn=warnings.append, pause_seconds=0)
    found = list_checkpoints(uploaded.run.checkpoints, uploaded.run.fingerprint, pytest.fail)
    uploads.add(found[-1])
    uploads.finish()
    assert "Training continues" in warnings[0]
    assert "step-00000008" in warnings[-1] and "start the run again" in warnings[-1]
    (blocked / "checkpoints").unlink()
    again = Uploads(uploaded.run, str(blocked), keep=1, warn=pytest.fail, pause_seconds=0)
    again.start(max_step=8)
    again.finish()
    assert checkpoints(there(tmp_path / "store")) == uploaded.steps_on_disk()


def test_a_password_in_the_url_is_refused_and_not_shown(small: SmallRun, capfd):
    with pytest.raises(ConfigError, match="holds credentials") as e:
        small.train("execution.upload_to=s3://user:hunter2@bucket/runs")
    assert "hunter2" not in str(e.value) + capfd.readouterr().out + json.dumps(small.run.read_outcome())


def test_a_long_record_is_sent_in_parts_and_no_full_one_again(store: Path, uploaded: SmallRun, tmp_path, monkeypatch):
    monkeypatch.setattr(upload, "_PART_BYTES", 1000)
    run = RunFolder(Path(shutil.copytree(uploaded.run.path, tmp_path / "small" / "v1")))
    sent = []
    monkeypatch.setattr(upload.remote, "upload", lambda path, url: sent.append(url.rsplit("/", 1)[1]) or put(path, url))
    uploads = Uploads(run, (store / "parts").as_uri(), keep=1, warn=pytest.fail)
    uploads._send_records()
    whole = run.metrics_file.read_bytes()
    assert len(whole) > 3000
    assert b"".join((store / "parts" / f"metrics.jsonl{n}").read_bytes() for n in ("", ".1", ".2")) == whole[:3000]
    sent.clear()
    run.append_metrics({"step": 9, "loss": 1.0})
    uploads._send_records()
    last = len(run.metrics_file.read_bytes()) // 1000
    assert (
        {n for n in sent if n.startswith("metrics")} <= {f"metrics.jsonl.{last - 1}", f"metrics.jsonl.{last}"} != set()
    )
    whole = run.metrics_file.read_bytes()
    run.metrics_file.unlink()
    uploads._fetch_record(run.metrics_file)
    assert run.metrics_file.read_bytes() == whole


def test_descriptions_there_are_read_once_however_many_follow(store: Path, uploaded: SmallRun, tmp_path, monkeypatch):
    read = []
    real = upload.remote.read_json_at
    monkeypatch.setattr(upload.remote, "read_json_at", lambda url: read.append(url) or real(url))
    uploads = Uploads(uploaded.run, (store / "small" / "v1").as_uri(), keep=1, warn=pytest.fail)
    for checkpoint in uploaded.run.saved() * 3:
        uploads._send(checkpoint)
    assert len([url for url in read if url.endswith("checkpoint.json")]) <= len(uploaded.run.saved())
