"""The digest of weights: equal for equal weights whatever saved them, and another for any other bit."""

import hashlib
import json
import shutil
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from gloo_workers import train_in_processes
from small_run import SmallRun
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Placement, Replicate, Shard, distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from openlm_pipeline.checkpoints.folders import COMPLETE, INFO, Checkpoint, list_checkpoints, promote, read_checkpoint
from openlm_pipeline.checkpoints.reading import load_model
from openlm_pipeline.checkpoints.weights_digest import digest_of_parts, local_part, weights_digest
from openlm_pipeline.errors import DataError
from openlm_pipeline.evaluation.scored import milestone_digest
from openlm_pipeline.fingerprint import fingerprint
from openlm_pipeline.models import ModelConfig
from openlm_pipeline.models.transformer import Transformer
from openlm_pipeline.pipeline.training import checkpoint_result

FROZEN = "training.lr=1e-60"  # no weight moves, so that any number of steps and processes leaves the same ones


def saved(small: SmallRun) -> list[Checkpoint]:
    return list_checkpoints(small.run.checkpoints, small.run.fingerprint, warn=pytest.fail)


def from_files(checkpoint: Checkpoint) -> str:
    """As of a checkpoint that an earlier release wrote."""
    return weights_digest(replace(checkpoint, weights_digest=None))


def of_tensors(tensors: dict[str, torch.Tensor]) -> str:
    return digest_of_parts([{name: local_part(tensor) for name, tensor in tensors.items()}])


@pytest.fixture(scope="module")
def frozen(tmp_path_factory: pytest.TempPathFactory) -> SmallRun:
    """A run of one process with its initial weights after 2 and after 4 steps."""
    small = SmallRun(tmp_path_factory.mktemp("frozen"), (2, 4))
    small.train(FROZEN)
    return small


@pytest.mark.parametrize("override", ["seed=0", "model.weight_tying=true", "model.ffn=gelu", "model.qk_norm=true"])
@pytest.mark.parametrize("asynchronous", ["true", "false"])
def test_what_is_recorded_is_what_the_files_hold(tmp_path: Path, override: str, asynchronous: str):
    small = SmallRun(tmp_path, (2,))
    small.train(override, f"execution.async_save={asynchronous}")
    (checkpoint,) = saved(small)
    recorded = json.loads((checkpoint.path / INFO).read_text())["weights_digest"]
    assert recorded == weights_digest(checkpoint) == from_files(checkpoint)
    assert recorded == of_tensors(dict(load_model(checkpoint).named_parameters()))
    assert checkpoint_result(checkpoint, reused=True).facts["weights_digest"] == recorded


def test_equal_weights_have_one_digest_in_other_files(frozen: SmallRun):
    first, second = saved(frozen)
    assert first.files[".metadata"] != second.files[".metadata"] and first.digest != second.digest
    assert first.weights_digest == second.weights_digest


def test_it_is_the_same_at_two_processes_that_resume(frozen: SmallRun, tmp_path: Path):
    small = SmallRun(tmp_path, (2, 4))
    small.train(FROZEN, "milestones=[512]")
    train_in_processes(small, 2, FROZEN)
    last = saved(small)[-1]
    assert last.step == 4 and len(list(last.path.glob("*.distcp"))) == 2
    assert last.weights_digest == from_files(last) == saved(frozen)[-1].weights_digest


def test_bf16_weights_are_hashed_as_they_are_saved(frozen: SmallRun, tmp_path: Path):
    small = SmallRun(tmp_path, (2,))
    small.train(FROZEN, "training.state_precision=bf16")
    (half,) = saved(small)
    weights = load_model(saved(frozen)[0]).named_parameters()
    assert half.weights_digest == from_files(half) == of_tensors({name: p.bfloat16() for name, p in weights})


def test_one_element_of_a_saved_model_counts(frozen: SmallRun):
    model = load_model(saved(frozen)[0])
    assert of_tensors(dict(model.named_parameters())) == saved(frozen)[0].weights_digest
    for name, parameter in model.named_parameters():
        last = parameter.detach().view(-1)[-1:].view(torch.int32)
        last ^= 1
        assert of_tensors(dict(model.named_parameters())) != saved(frozen)[0].weights_digest, name
        last ^= 1


def test_each_bit_name_shape_and_type_counts():
    w = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    flipped = w.clone()
    flipped.view(torch.int32)[3, 5] ^= 1
    variants = [{"w": w}, {"v": w}, {"w": flipped}, {"w": w.reshape(6, 4)}, {"w": w.to(torch.bfloat16)}]
    variants += [{"w": w.flatten()}, {"w": w, "b": torch.zeros(3)}, {"w": w.reshape(4, 3, 2)}]
    assert len({of_tensors(variant) for variant in variants}) == len(variants)


def test_the_definition_written_out():
    gain, row = struct.pack("<3f", 1.5, 2, 3), struct.pack("<2H", 0x3F80, 0x3F80)
    weights = [
        ["gain", "float32", [3], hashlib.sha256(hashlib.sha256(gain).digest()).hexdigest()],
        ["w", "bfloat16", [4, 2], hashlib.sha256(4 * hashlib.sha256(row).digest()).hexdigest()],
    ]
    expected = hashlib.sha256(json.dumps({"weights": weights}, separators=(",", ":")).encode()).hexdigest()
    assert of_tensors({"w": torch.ones(4, 2, dtype=torch.bfloat16), "gain": torch.tensor([1.5, 2, 3])}) == expected


def test_a_weight_with_two_names_counts_once_under_the_first():
    """These names never change either, or what is recorded in checkpoints could not be compared."""
    config = ModelConfig(
        hidden_dim=8, n_layers=1, n_heads=2, vocab_size=11, weight_tying=True, ffn="gelu", qk_norm=True
    )
    with torch.device("meta"):
        model = Transformer(config)
    tensors = {n: torch.arange(p.numel(), dtype=torch.float32).reshape(p.shape) for n, p in model.named_parameters()}
    assert {"tok_embeddings.weight", "layers.0._ff_w1.weight"} <= set(tensors)
    assert "output.weight" not in tensors and not any("feed_forward" in name for name in tensors)
    assert of_tensors(tensors) == "550ee36967bfa908aecedd9fd116ccb26e0d5d5443875265103d3a478780814f"


@contextmanager
def pretended_rank(rank: int, size: int) -> Iterator[None]:
    """A process group in which this process is one of many, and no other is there."""
    dist.init_process_group("fake", rank=rank, world_size=size, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(
    ("mesh_shape", "placements"),
    [
        ((1,), [Shard(0)]),
        ((8,), [Shard(0)]),
        ((2, 4), [Replicate(), Shard(0)]),
        ((2, 4), [Replicate(), Shard(1)]),
        ((2, 4), [Shard(0), Shard(1)]),
        ((8,), [Replicate()]),
    ],
    ids=lambda value: str(value),
)
def test_any_mesh_gives_the_digest_of_one_process(mesh_shape: Sequence[int], placements: list[Placement]):
    """Rows that do not divide, fewer rows than ranks, and rows that no rank has whole."""
    whole = {"w": torch.randn(13, 6), "few": torch.randn(3, 2, 5), "half": torch.randn(9, 4).bfloat16()}
    vectors = {"gain": torch.randn(7)}
    processes = []
    for rank in range(size := torch.Size(mesh_shape).numel()):
        with pretended_rank(rank, size):
            mesh = init_device_mesh("cpu", tuple(mesh_shape))
            of_vectors = [Shard(0) if isinstance(p, Shard) and p.dim == 0 else Replicate() for p in placements]
            sharded = {
                name: distribute_tensor(tensor, mesh, used, src_data_rank=None)
                for tensors, used in ((whole, placements), (vectors, of_vectors))
                for name, tensor in tensors.items()
            }
            processes.append({name: local_part(tensor) for name, tensor in sharded.items()})
    assert digest_of_parts(processes) == of_tensors({**whole, **vectors})
    sent = [part.data for process in processes for name, part in process.items() if name == "w"]
    assert sum(map(len, sent)) == (13 * 32 if all(p in (Shard(0), Replicate()) for p in placements) else 13 * 6 * 4)


def test_a_part_that_no_process_gives_is_missed():
    whole = {"w": local_part(torch.randn(4, 6)), "gain": local_part(torch.randn(5))}
    for name, part in whole.items():
        with pytest.raises(DataError, match=f"parts of {name} that the processes have are not the whole"):
            digest_of_parts([{**whole, name: replace(part, data=b"")}])


def test_a_checkpoint_keeps_its_digest_as_a_milestone(frozen: SmallRun, tmp_path: Path):
    copy = Path(shutil.copytree(saved(frozen)[0].path, tmp_path / "step-00000002"))
    before = read_checkpoint(copy)
    assert promote(before, "t1", {}).weights_digest == before.weights_digest
    after = read_checkpoint(copy)
    assert (after.milestone, after.weights_digest, after.digest) == ("t1", before.weights_digest, before.digest)


def test_scores_are_filed_under_the_weights_whatever_files_have_them(frozen: SmallRun):
    first = saved(frozen)[0]
    again = replace(first, files={name: {**file, "sha256": "other"} for name, file in first.files.items()})
    assert again.digest != first.digest and milestone_digest(first, "fp32") == first.weights_digest
    assert milestone_digest(again, "bf16") == milestone_digest(first, "bf16") != first.weights_digest
    assert milestone_digest(again, "fp32", "ema") != milestone_digest(first, "fp32", "ema")
    earlier = replace(first, weights_digest=None)
    assert milestone_digest(earlier, "fp32") == first.digest


def test_a_checkpoint_of_an_earlier_release_stays_what_it_was(frozen: SmallRun, tmp_path: Path):
    """Without the key its description verifies, also after a promotion, and its digest of files is unchanged."""
    path = Path(shutil.copytree(saved(frozen)[0].path, tmp_path / "step-00000002"))
    info = json.loads((path / INFO).read_text())
    del info["sha256"]
    recorded = info.pop("weights_digest")
    (path / INFO).write_text(json.dumps({**info, "sha256": fingerprint(info)}))
    old = read_checkpoint(path)
    assert old.weights_digest is None and weights_digest(old) == recorded
    assert "weights_digest" not in checkpoint_result(old, reused=True).facts
    expected = fingerprint({"files": info["files"], "run": info["run_fingerprint"], "step": 2})
    assert old.digest == saved(frozen)[0].digest == expected
    promote(old, "t1", {})
    assert "weights_digest" not in json.loads((path / INFO).read_text())
    assert read_checkpoint(path).milestone == "t1" and (path / COMPLETE).exists()


def test_old_files_that_are_damaged_are_not_hashed(frozen: SmallRun, tmp_path: Path):
    path = Path(shutil.copytree(saved(frozen)[0].path, tmp_path / "step-00000002"))
    (data,) = path.glob("*.distcp")
    broken = bytearray(data.read_bytes())
    broken[-1] ^= 1
    data.write_bytes(broken)
    with pytest.raises(DataError, match="damaged"):
        from_files(read_checkpoint(path))
