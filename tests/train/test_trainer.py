"""What a run does in one process: checkpoints, milestones, damage, identity, and errors for people."""

import json
import os
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from small_run import SmallRun, write_dataset

from openlm_pipeline.checkpoints.folders import COMPLETE, list_checkpoints, read_checkpoint
from openlm_pipeline.checkpoints.reading import load_model
from openlm_pipeline.errors import (
    BusyError,
    ConfigError,
    ConsentError,
    DataError,
    IdentityError,
    MissingInputError,
    TrainingError,
)
from openlm_pipeline.models import init
from openlm_pipeline.runs import machine
from train import distributed
from train.distributed import leave_process_group, start, stay_near_gpu
from train.optimizers import make_optimizer
from train.parallel import build_model
from train.saver import load


def checkpoint_folder(small: SmallRun, step: int) -> Path:
    return small.run.checkpoints / f"step-{step:08d}"


def weights(small: SmallRun, step: int) -> dict[str, torch.Tensor]:
    return load_model(read_checkpoint(checkpoint_folder(small, step))).state_dict()


def assert_bitwise_equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    different = [name for name in a if not torch.equal(a[name], b[name])]
    assert not different


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> SmallRun:
    """A finished run of milestones at 4 and 8 steps and a rotating checkpoint at 6. Copy it before changing it."""
    small = SmallRun(tmp_path_factory.mktemp("trained"), (4, 8))
    small.train("execution.checkpoint_every=512", "execution.keep_checkpoints=1")
    return small


@pytest.fixture
def copy(trained: SmallRun, tmp_path: Path) -> SmallRun:
    small = SmallRun(tmp_path, (4, 8))
    shutil.copytree(trained.run.path, small.run.path)
    return small


def test_a_run_learns_and_says_so(trained: SmallRun):
    losses = trained.losses()
    assert list(losses) == list(range(1, 9))
    assert losses[8] < losses[1] - 0.1
    assert list(trained.validation_losses()) == [4, 8]
    assert trained.run.read_outcome().items() >= {"status": "completed", "step": 8, "tokens": 2048}.items()
    assert trained.steps_on_disk() == {4: "t1024", 6: None, 8: "t2048"}


def test_weights_do_not_depend_on_where_a_run_was_interrupted(trained: SmallRun, small: SmallRun):
    small.train("milestones=[1024]")
    small.train()
    assert small.losses() == trained.losses()
    assert_bitwise_equal(weights(small, 8), weights(trained, 8))


def test_a_finished_run_is_not_trained_again(copy: SmallRun, capfd):
    before = copy.run.metrics_file.read_bytes()
    copy.train()
    assert copy.run.metrics_file.read_bytes() == before
    assert copy.run.read_outcome().items() >= {"status": "completed", "step": 8, "tokens": 2048}.items()


DAMAGED_FILES = ["*.distcp", ".metadata", "model_config.json", "checkpoint.json"]


@pytest.mark.parametrize("pattern", DAMAGED_FILES)
@pytest.mark.parametrize("damage", ["flipped", "truncated"])
def test_damage_in_the_newest_checkpoint_is_named_and_the_one_before_used(
    copy: SmallRun, trained: SmallRun, pattern: str, damage: str, capfd
):
    shutil.rmtree(checkpoint_folder(copy, 8))
    (damaged,) = list(checkpoint_folder(copy, 6).glob(pattern))
    data = bytearray(damaged.read_bytes())
    data[len(data) // 2] ^= 1
    damaged.write_bytes(data[:-1] if damage == "truncated" else data)
    copy.train()
    out = capfd.readouterr().out
    warning = next(line for line in out.splitlines() if line.startswith("warning"))
    assert damaged.name in warning and "step-00000006" in warning
    assert "resumed from step-00000004" in out
    assert_bitwise_equal(weights(copy, 8), weights(trained, 8))


def test_every_flipped_byte_of_a_description_is_noticed(copy: SmallRun):
    path = checkpoint_folder(copy, 8) / "checkpoint.json"
    intact = path.read_bytes()
    meaning = json.loads(intact)
    for i in range(len(intact)):
        changed = bytearray(intact)
        changed[i] ^= 1
        path.write_bytes(changed)
        warnings: list[str] = []
        found = list_checkpoints(copy.run.checkpoints, copy.run.fingerprint, warnings.append)
        try:
            same = json.loads(changed) == meaning
        except ValueError:
            same = False
        assert (8 in [c.step for c in found]) == same
        assert same or "checkpoint.json" in warnings[0]


def test_without_its_mark_a_checkpoint_is_not_seen(copy: SmallRun, trained: SmallRun, capfd):
    (checkpoint_folder(copy, 8) / COMPLETE).unlink()
    (checkpoint_folder(copy, 6) / COMPLETE).unlink()
    (copy.run.checkpoints / ".tmp-step-00000007").mkdir()
    copy.train()
    assert "resumed from step-00000004" in capfd.readouterr().out
    assert_bitwise_equal(weights(copy, 8), weights(trained, 8))
    assert not list(copy.run.checkpoints.glob(".tmp-*"))


def test_a_damaged_milestone_is_made_again_and_keeps_its_label(copy: SmallRun, trained: SmallRun):
    """The milestone at 4 is all there is to start from, and it is damaged: the run begins anew and makes both."""
    shutil.rmtree(checkpoint_folder(copy, 6))
    shutil.rmtree(checkpoint_folder(copy, 8))
    (part,) = list(checkpoint_folder(copy, 4).glob("*.distcp"))
    part.write_bytes(part.read_bytes()[:100])
    with pytest.raises(ConsentError, match="milestone t1024 is damaged.*\\n.*--allow remake"):
        copy.train()
    assert copy.steps_on_disk() == {4: "t1024"}
    copy.train(allow={"remake"})
    assert copy.steps_on_disk() == {4: "t1024", 8: "t2048"}
    assert_bitwise_equal(weights(copy, 4), weights(trained, 4))
    assert_bitwise_equal(weights(copy, 8), weights(trained, 8))


def test_a_damaged_rotating_checkpoint_does_not_become_a_milestone(copy: SmallRun, trained: SmallRun):
    (part,) = list(checkpoint_folder(copy, 6).glob("*.distcp"))
    part.write_bytes(part.read_bytes()[:100])
    copy.train("milestones=[1024,1536,2048]")
    assert copy.steps_on_disk() == {4: "t1024", 6: "t1536", 8: "t2048"}
    load_model(read_checkpoint(checkpoint_folder(copy, 6)))  # verifies it


def test_a_later_milestone_trains_only_from_the_last_checkpoint(copy: SmallRun):
    before = copy.run.metrics_file.read_text()
    copy.train("milestones=[1024,2048,2560]")
    added = copy.run.metrics_file.read_text().removeprefix(before)
    assert [json.loads(line)["step"] for line in added.splitlines()] == [9, 10, 10]
    assert copy.steps_on_disk() == {4: "t1024", 6: None, 8: "t2048", 10: "t2560"}


def test_a_milestone_in_the_past_is_promoted_or_made(copy: SmallRun):
    before = copy.run.metrics_file.read_text()
    copy.train("milestones=[512,1024,1536,2048]")
    added = copy.run.metrics_file.read_text().removeprefix(before)
    assert [json.loads(line)["step"] for line in added.splitlines()] == [1, 2, 2, 6]  # 2 anew; 6 is only validated
    assert copy.steps_on_disk() == {2: "t0512", 4: "t1024", 6: "t1536", 8: "t2048"}


def test_rotation_keeps_the_newest_and_every_milestone(small: SmallRun):
    small.train("execution.checkpoint_every=256", "execution.keep_checkpoints=2")
    assert small.steps_on_disk() == {4: "t1024", 6: None, 7: None, 8: "t2048"}


def test_another_run_in_the_folder_is_refused_by_field_and_set_aside_on_request(copy: SmallRun):
    before = copy.run.identity
    with pytest.raises(IdentityError, match=r"training\.lr 0\.01 -> 0\.02"):
        copy.train("training.lr=0.02")
    assert copy.run.identity == before
    copy.train("training.lr=0.02", allow={"supersede"})
    assert copy.steps_on_disk() == {4: "t1024", 8: "t2048"}
    old = copy.run.path.with_name("v1.superseded-1")
    assert sorted(p.name for p in (old / "checkpoints").iterdir()) == [
        "step-00000004",
        "step-00000006",
        "step-00000008",
    ]


def test_other_data_is_another_run(copy: SmallRun):
    write_dataset(copy.home, "code", 67, seed=99)
    with pytest.raises(IdentityError, match=r"data\[1\]\.manifest_sha256"):
        copy.train()


def test_how_a_run_is_executed_does_not_make_it_another(copy: SmallRun):
    copy.train("launcher.processes=2", "execution.micro_batch=2", "execution.log_every=3")


def test_a_checkpoint_of_another_run_is_refused(copy: SmallRun, small: SmallRun, tmp_path: Path):
    other = SmallRun(tmp_path / "other", (4, 8))
    other.train("seed=1", "milestones=[512]")
    shutil.copytree(other.run.checkpoints / "step-00000002", checkpoint_folder(copy, 2))
    with pytest.raises(IdentityError, match="step-00000002 is a checkpoint of another run"):
        copy.train()


def test_a_loss_that_is_not_finite_ends_the_run_before_anything_is_saved(small: SmallRun):
    overrides = ["training.lr=1e30", "training.grad_clip=null", "training.warmup=0", "execution.checkpoint_every=256"]
    with pytest.raises(TrainingError, match="not finite"):
        small.train(*overrides)
    outcome = small.run.read_outcome()
    assert outcome["status"] == "failed" and "not finite" in outcome["reason"]
    for step in small.steps_on_disk():
        assert all(torch.isfinite(w).all() for w in weights(small, step).values())


def test_weights_that_are_not_finite_are_not_saved_between_log_steps(small: SmallRun):
    overrides = ["training.lr=1e30", "training.grad_clip=null", "training.warmup=0", "execution.checkpoint_every=1024"]
    with pytest.raises(TrainingError, match="not finite"):
        small.train(*overrides, "milestones=[2048]", "execution.log_every=100")
    assert small.steps_on_disk() == {}


@pytest.mark.parametrize("micro_batch", [1, 4])
def test_gradient_accumulation_gives_the_same_losses(trained: SmallRun, small: SmallRun, micro_batch: int):
    small.train(f"execution.micro_batch={micro_batch}")
    assert small.losses() == pytest.approx(trained.losses(), rel=1e-6)


def test_a_micro_batch_that_does_not_divide_becomes_one_that_does(trained: SmallRun, small: SmallRun, capfd):
    small.train("execution.micro_batch=3")
    assert small.losses() == pytest.approx(trained.losses(), rel=1e-6)
    assert "micro-batches of 2 sequences, not 3: each of 1 processes has 8 a step" in capfd.readouterr().out


def test_a_milestone_is_hashed_as_it_is_written_and_not_again(small: SmallRun, monkeypatch):
    verified: list[int] = []
    monkeypatch.setattr("train.loop.verify", lambda checkpoint, **share: verified.append(checkpoint.step))
    small.train()
    assert small.steps_on_disk() == {4: "t1024", 8: "t2048"} and verified == []
    small.train("milestones=[1024, 2048, 3072]")
    assert verified == [8]


def test_weights_are_drawn_only_where_none_are_loaded(trained: SmallRun, copy: SmallRun, tmp_path: Path, monkeypatch):
    drawn: list[str] = []
    real = init.initial_values
    monkeypatch.setattr(init, "initial_values", lambda name, *rest: drawn.append(name) or real(name, *rest))
    copy.train("milestones=[1024, 2048, 3072]")
    assert drawn == []
    small = SmallRun(tmp_path / "new", (4,))
    small.train()
    assert drawn and small.losses() == {s: loss for s, loss in trained.losses().items() if s <= 4}


def test_missing_shards_are_refused_with_the_command_that_makes_them(small: SmallRun):
    shutil.rmtree(small.home.shards("code", "v1"))
    with pytest.raises(MissingInputError, match=r"shards/code/v1.*openlm tokenize"):
        small.train()


def test_shards_of_another_length_are_refused(small: SmallRun):
    with pytest.raises(ConfigError, match="seq_len 32, not 64"):
        small.train("seq_len=64")


def test_a_vocabulary_larger_than_the_models_is_refused(small: SmallRun):
    with pytest.raises(ConfigError, match="id 259, and the model's embedding has 256 rows.*model.vocab_size to 260"):
        small.train("model.vocab_size=256")


def test_held_out_text_of_a_larger_vocabulary_is_refused(small: SmallRun):
    write_dataset(small.home, "heldout", 40, seed=2, vocab_size=300)
    with pytest.raises(ConfigError, match="shards/heldout/v1 may hold the id 299, .* has 260 rows"):
        small.train()


def test_two_milestones_at_one_step_are_refused(small: SmallRun):
    with pytest.raises(ConfigError, match="two milestones end at the same step"):
        small.experiment("milestones=[1000,1024]")


def test_a_second_trainer_is_refused(copy: SmallRun):
    with copy.run.lock(), pytest.raises(BusyError, match="already training"):
        copy.train()


@pytest.mark.parametrize(
    ("override", "exit_code"),
    [("training.lr=0.02", IdentityError.exit_code), ("seq_len=64", ConfigError.exit_code)],
)
def test_exit_codes_tell_what_was_wrong(copy: SmallRun, override: str, exit_code: int, monkeypatch, capsys):
    from train.__main__ import main

    monkeypatch.setenv("OPENLM_HOME", str(copy.home.root))
    monkeypatch.setattr(sys, "argv", ["train", str(copy.recipe), override])
    assert main() == exit_code
    assert capsys.readouterr().err.startswith("error: ")


@pytest.mark.parametrize("own", [None, "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_gpu_memory_is_in_expandable_segments_unless_the_user_says_otherwise(own: str | None, monkeypatch, capsys):
    from train.__main__ import main

    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.setenv(name, "backend:native")
        if name != own:
            monkeypatch.delenv(name)
    monkeypatch.setattr(sys, "argv", ["train", "no_such_recipe"])
    assert main() != 0
    expected = {own: "backend:native"} if own else {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
    assert {name: value for name, value in os.environ.items() if "ALLOC_CONF" in name} == expected


def test_a_process_stays_on_the_cpus_of_its_gpus_node_where_it_may_use_some(tmp_path: Path):
    gpu = SimpleNamespace(pci_domain_id=0, pci_bus_id=0xDC, pci_device_id=1)
    listed = tmp_path / "0000:dc:01.0" / "local_cpulist"
    listed.parent.mkdir()
    allowed = os.sched_getaffinity(0)
    last = max(allowed)
    try:
        stay_near_gpu(gpu, tmp_path)
        assert os.sched_getaffinity(0) == allowed
        for text, left in (("\n", allowed), ("9000,9002-9003\n", allowed), (f"{last},9002-9003\n", {last})):
            listed.write_text(text)
            stay_near_gpu(gpu, tmp_path)
            assert os.sched_getaffinity(0) == left
    finally:
        os.sched_setaffinity(0, allowed)


@pytest.mark.parametrize(("platform", "limit"), [("darwin", 10_240), ("linux", 2**63 - 1)])
def test_as_many_files_may_be_open_as_the_system_grants(platform: str, limit: int, monkeypatch):
    unlimited, asked = 2**63 - 1, []
    monkeypatch.setattr(distributed.sys, "platform", platform)
    monkeypatch.setattr(distributed.resource, "getrlimit", lambda kind: (256, unlimited))
    monkeypatch.setattr(distributed.resource, "setrlimit", lambda kind, limits: asked.append(limits))
    distributed.raise_file_limit()
    assert asked == [(limit, unlimited)]


def test_days_on_a_cpu_are_refused_by_the_trainer_itself(small: SmallRun, monkeypatch, capsys):
    from train.__main__ import main

    monkeypatch.setenv("OPENLM_HOME", str(small.home.root))
    monkeypatch.setattr(sys, "argv", ["train", str(small.recipe), "milestones=[10T]"])
    assert main() == ConsentError.exit_code
    assert re.search(r"error: small takes .* operations for 10T tokens.*\n.*--allow cpu", capsys.readouterr().err)
    assert not small.run.path.exists()

    monkeypatch.setattr(machine, "CPU_FLOPS", 1e6)
    with pytest.raises(ConsentError, match="--allow cpu"):
        small.train()
    small.train(allow={"cpu"})
    assert small.run.read_outcome()["status"] == "completed"


def test_a_checkpoint_without_a_state_that_a_run_needs_is_refused(small: SmallRun):
    small.train("milestones=[1024]")
    (folder,) = small.run.checkpoints.glob("step-*")
    world = start()
    try:
        model = build_model(small.experiment(), world)
        optimizer, extra = make_optimizer(small.experiment().training, model), {"ema_0.9_2": {"x": torch.zeros(1)}}
        with pytest.raises(DataError, match="ema_0.9_2"):
            load(read_checkpoint(folder), model, optimizer, extra)
        assert not load(read_checkpoint(folder), model, optimizer, extra, optional=["ema_0.9_2"])
    finally:
        leave_process_group()
