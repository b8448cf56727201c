"""What a run shows while it runs: metrics.jsonl, TensorBoard, Weights & Biases offline, and a profile."""

import gzip
import json
import math
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from small_run import BATCH, SmallRun

from openlm_pipeline.errors import ConfigError, TrainingError
from openlm_pipeline.runs.estimates import flops_per_token, peak_flops
from train.hooks.reporters import WandbWriter, scalars

wandb = pytest.importorskip("wandb")
pytest.importorskip("tensorboard")
from wandb.proto.wandb_internal_pb2 import Record  # noqa: E402

OPENLM_TRAIN = {"loss", "lr", "tokens", "samples_per_second", "samples_per_second_per_gpu", "batch_time", "data_time"}
OURS_TRAIN = {"grad_norm", "tokens_per_second", "memory_bytes", "data_wait_fraction", "flops_per_second_per_gpu"}


def wandb_records(path: Path) -> Iterator[Record]:
    """Records of a .wandb file: LevelDB's log after a header of 7 bytes, in blocks of 32 KiB."""
    data, at, parts = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        length, kind = struct.unpack("<HB", data[at + 4 : at + 7])
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield Record.FromString(parts)
            parts = b""


def wandb_histories(run_path: Path) -> list[tuple[str, list[dict]]]:
    """(run id, the rows that were logged) of each offline folder."""
    wandb.teardown()  # as the end of a process: wandb's service writes its last rows
    found = []
    for path in sorted(run_path.glob("wandb/offline-run-*/*.wandb")):
        rows, run_id = [], ""
        for record in wandb_records(path):
            run_id = record.run.run_id or run_id
            if record.HasField("history"):
                rows.append({i.key or i.nested_key[0]: json.loads(i.value_json) for i in record.history.item})
        found.append((run_id, rows))
    return found


@pytest.fixture(autouse=True)
def fresh_wandb() -> None:
    """wandb reads its environment once per process, so each test gets a new start."""
    wandb.teardown()


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)


def test_metrics_have_what_the_trainer_promises(small: SmallRun):
    small.train()
    records = [r for r in small.run.read_metrics() if "loss" in r]
    flops = flops_per_token(small.experiment().model_config_resolved(), 32)
    for r in records:
        assert r["mfu"] is None  # a CPU has no peak in the table
        assert r["tokens_per_second_per_gpu"] == r["tokens_per_second"]  # one process
        assert r["flops_per_second_per_gpu"] == pytest.approx(r["tokens_per_second"] * flops)
        assert r["step_seconds"] == pytest.approx(BATCH / r["tokens_per_second"])
        assert 0 <= r["data_wait_seconds"] < r["step_seconds"]
        assert r["memory_bytes"] > 0 and r["memory_reserved_bytes"] >= r["memory_bytes"]
        assert "skipped_steps" not in r


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_gpu_that_is_known_has_an_mfu(small: SmallRun):
    small.train("milestones=[1024]", "training.precision=bf16")
    known = peak_flops(torch.cuda.get_device_name(), "bf16") is not None
    for record in (r for r in small.run.read_metrics() if "loss" in r):
        assert 0 < record["mfu"] < 1 if known else record["mfu"] is None
        assert record["memory_reserved_bytes"] >= record["memory_bytes"] > 0


def test_steps_left_out_are_counted_and_not_averaged(small: SmallRun):
    """The first step throws the weights far off, so that the loss of the other three is not finite."""
    hurt = ["training.lr=1e30", "training.warmup=0", "training.grad_clip=null", "training.max_skipped_steps=100"]
    with pytest.raises(TrainingError, match="validation loss"):
        small.train("milestones=[1024]", "execution.log_every=4", *hurt)
    (record,) = [r for r in small.run.read_metrics() if "loss" in r]
    assert record["skipped_steps"] == 3
    assert record["loss"] == pytest.approx(math.log(260), rel=0.1)  # the first step's


def test_tensorboard_has_the_records_under_openlms_names(small: SmallRun):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    small.train("execution.report_to=[tensorboard]")
    events = EventAccumulator(str(small.run.path / "tensorboard")).Reload()
    tags = set(events.Tags()["scalars"])
    assert {f"train/{name}" for name in OPENLM_TRAIN | OURS_TRAIN} | {"valid/loss", "valid/perplexity"} <= tags
    shown = {e.step: e.value for e in events.Scalars("train/loss")}
    assert shown == pytest.approx(small.losses(), rel=1e-6)
    assert {e.step: e.value for e in events.Scalars("valid/loss")} == pytest.approx(small.validation_losses(), rel=1e-6)
    assert [e.value for e in events.Scalars("valid/train_tokens")] == [4 * BATCH, 8 * BATCH]


def test_wandb_has_the_records_and_a_restart_goes_on_with_the_same_run(small: SmallRun, offline: None):
    small.train("execution.report_to=[wandb]", "milestones=[1024]")
    small.train("execution.report_to=[wandb]")
    (first_id, first), (second_id, second) = wandb_histories(small.run.path)
    assert first_id == second_id
    losses = {row["_step"]: row["train/loss"] for row in [*first, *second]}
    assert losses == pytest.approx(small.losses())
    assert first[-1]["valid/loss"] == small.validation_losses()[4]
    assert {f"train/{name}" for name in OPENLM_TRAIN | OURS_TRAIN} <= set(second[0])


def test_one_recipe_in_two_homes_is_two_wandb_runs(tmp_path: Path, offline: None):
    ids = []
    for home in ("a", "b"):
        small = SmallRun(tmp_path / home, (4,))
        small.train("execution.report_to=[wandb]")
        ids += [wandb_id for wandb_id, _ in wandb_histories(small.run.path)]
    assert len(set(ids)) == len(ids) == 2


def test_other_settings_are_another_wandb_run(small: SmallRun, offline: None):
    small.train("execution.report_to=[wandb]", "milestones=[1024]")
    small.train("execution.report_to=[wandb]", "milestones=[1024]", "training.lr=0.02", allow={"supersede"})
    (first,) = wandb_histories(small.run.path.with_name("v1.superseded-1"))
    (second,) = wandb_histories(small.run.path)
    assert first[0] != second[0]


def test_a_network_that_is_not_there_does_not_stop_training(small: SmallRun, monkeypatch: pytest.MonkeyPatch, capfd):
    """Against a port where nobody listens."""
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_INIT_TIMEOUT", "1")
    small.train("execution.report_to=[wandb]", "milestones=[1024]")
    assert small.run.read_outcome()["status"] == "completed"
    assert "warning: wandb is off for this process: CommError" in capfd.readouterr().out


def test_a_key_comes_from_the_environment_only(small: SmallRun, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    with pytest.raises(ConfigError, match="WANDB_API_KEY is not set"):
        small.train("execution.report_to=[wandb]")


@pytest.mark.parametrize("package", ["wandb", "tensorboard"])
def test_a_package_that_is_missing_is_named_before_training(small: SmallRun, offline: None, package: str, monkeypatch):
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else find(name))
    with pytest.raises(ConfigError, match=rf"pip install 'openlm-pipeline\[{package}\]'"):
        small.train(f"execution.report_to=[{package}]")
    assert small.losses() == {}


def test_writing_to_wandb_waits_for_nothing(small: SmallRun, offline: None, monkeypatch: pytest.MonkeyPatch):
    """Two thousand records are taken at once, while wandb is still starting, and are all there in the end."""
    small.train("milestones=[1024]")
    writer = WandbWriter(small.experiment(), small.run, pytest.fail)
    for step in range(2000):
        writer.write(step, {"train/loss": float(step)})
    assert writer.waiting.qsize() > 1000  # it did not keep up, and nobody waited for it
    writer.close()
    ((_, rows),) = wandb_histories(small.run.path)
    assert [row["train/loss"] for row in rows] == list(range(2000))


def test_scalars_leave_out_what_is_not_known():
    assert scalars({"step": 3, "time": 1.0, "loss": 2.0, "mfu": None}) == {"train/loss": 2.0}
    validation = {"step": 3, "tokens": 96, "validation_loss": 2.0, "validation_tokens": 32}
    assert scalars(validation) == {"valid/loss": 2.0, "valid/tokens": 32, "valid/train_tokens": 96}


@pytest.mark.parametrize(
    ("steps", "name"), [((2, 3), "steps-2-3"), ((1, 1), "steps-1-1"), ((3, 4), "steps-3-4"), ((4, 9), "steps-4-4")]
)
def test_a_profile_has_the_steps_that_were_asked_for(small: SmallRun, steps: tuple[int, int], name: str):
    small.train("milestones=[1024]", f"execution.profile_steps={list(steps)}")
    (path,) = (small.run.path / "profile").iterdir()
    assert path.name == f"{name}.json.gz"
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    optimizer_steps = [e for e in events if e["name"].startswith("Optimizer.step#")]
    first, last = steps
    assert len(optimizer_steps) == min(last, 4) - first + 1


def test_steps_that_are_past_are_not_profiled(small: SmallRun):
    small.train("milestones=[1024]")
    small.train("execution.profile_steps=[1,2]")
    assert not (small.run.path / "profile").exists()


def test_profile_steps_out_of_order_are_refused(small: SmallRun):
    with pytest.raises(ConfigError, match=r"profile_steps \[3, 2\]"):
        small.train("execution.profile_steps=[3,2]")


def test_perplexity_is_the_exponential_of_the_loss(small: SmallRun):
    small.train("milestones=[1024]")
    (record,) = [r for r in small.run.read_metrics() if "validation_loss" in r]
    assert record["validation_perplexity"] == pytest.approx(math.exp(record["validation_loss"]))
    assert record["validation_tokens"] == 21 * 32
