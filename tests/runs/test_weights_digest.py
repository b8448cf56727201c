"""The digest of weights: equal for equal weights whatever saved them, and another for any other bit."""

import json
from pathlib import Path

import pytest
import torch
from gloo_workers import train_in_processes
from small_run import SmallRun

from openlm_pipeline.checkpoints.folders import COMPLETE, INFO, Checkpoint, list_checkpoints, promote, read_checkpoint
from openlm_pipeline.checkpoints.reading import load_model
from openlm_pipeline.checkpoints.weights_digest import Part, digest_of_parts, local_part, weights_digest
from openlm_pipeline.errors import DataError
from openlm_pipeline.fingerprint import fingerprint

FROZEN = "training.lr=1e-60"  # no weight moves, so that all worlds have the same ones after some steps


def last(small: SmallRun) -> Checkpoint:
    return list_checkpoints(small.run.checkpoints, small.run.fingerprint, warn=pytest.fail)[-1]


def from_files(checkpoint: Checkpoint) -> str:
    """As of a checkpoint that an earlier release wrote."""
    return weights_digest(Checkpoint(**{**vars(checkpoint), "weights_digest": None}))


def from_model(checkpoint: Checkpoint) -> str:
    """With the tensors of the loaded model, by no part of the saver."""
    return digest_of_parts([{name: local_part(p) for name, p in load_model(checkpoint).named_parameters()}])


@pytest.mark.parametrize("override", ["seed=0", "model.weight_tying=true", "model.ffn=gelu", "model.qk_norm=true"])
@pytest.mark.parametrize("asynchronous", ["true", "false"])
def test_what_is_recorded_is_what_the_files_hold(tmp_path: Path, override: str, asynchronous: str):
    small = SmallRun(tmp_path, (2,))
    small.train(override, f"execution.async_save={asynchronous}")
    recorded = json.loads((last(small).path / INFO).read_text())["weights_digest"]
    assert recorded == weights_digest(last(small)) == from_files(last(small)) == from_model(last(small))


def test_it_is_the_same_at_two_processes_and_after_a_resume(tmp_path: Path):
    one, two, halves = (SmallRun(tmp_path / name, (2, 4)) for name in ("one", "two", "halves"))
    one.train(FROZEN)
    train_in_processes(two, 2, FROZEN)
    halves.train(FROZEN, "milestones=[512]")
    train_in_processes(halves, 2, FROZEN)
    digests = {last(run).weights_digest for run in (one, two, halves)}
    assert len(digests) == 1 and None not in digests
    assert from_files(last(two)) in digests
    assert len({last(run).digest for run in (one, two)}) == 2  # of the files, which are others


def test_bf16_weights_are_hashed_as_they_are_saved(tmp_path: Path):
    runs = {p: SmallRun(tmp_path / p, (2,)) for p in ("bf16", "fp32")}
    for precision, small in runs.items():
        small.train(FROZEN, f"training.state_precision={precision}")
    assert last(runs["bf16"]).weights_digest == from_files(last(runs["bf16"])) != last(runs["fp32"]).weights_digest


def test_each_bit_name_shape_and_type_counts():
    w = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    flipped = w.clone()
    flipped.view(torch.int32)[3, 5] ^= 1
    variants = [{"w": w}, {"v": w}, {"w": flipped}, {"w": w.reshape(6, 4)}, {"w": w.to(torch.bfloat16)}]
    variants += [{"w": w.flatten()}, {"w": w, "b": torch.zeros(3)}, {"w": w.reshape(4, 3, 2)}]
    digests = [digest_of_parts([{n: local_part(t) for n, t in v.items()}]) for v in variants]
    assert len(set(digests)) == len(variants)


def test_columns_and_rows_of_several_processes_make_one_digest():
    w, b = torch.randn(4, 6), torch.randn(5)
    whole = digest_of_parts([{"w": local_part(w), "b": local_part(b)}])
    rows = [local_part(w[:3]).rows[0], local_part(w[3:]).rows[0]]
    pieces = {"b": Part("float32", (5,), pieces={(0,): b[:3]})}, {"b": Part("float32", (5,), pieces={(3,): b[3:]})}
    by_rows = [
        {"w": Part("float32", (4, 6), {3: rows[1]}), **pieces[1]},
        {"w": Part("float32", (4, 6), {0: rows[0]}), **pieces[0]},
    ]
    columns = [Part("float32", (4, 6), pieces={(0, c): w[:, c : c + 3]}) for c in (0, 3)]
    by_columns = [{"w": part, **piece} for part, piece in zip(columns, pieces)]
    assert digest_of_parts(by_rows) == digest_of_parts(by_columns) == whole
    for incomplete in (by_rows[:1], by_columns[:1]):
        with pytest.raises(DataError, match="are not the whole of it"):
            digest_of_parts(incomplete)


def test_a_checkpoint_of_an_earlier_release_stays_what_it_was(tmp_path: Path):
    """Without the key its description verifies, also after a promotion, and its digest of files is unchanged."""
    small = SmallRun(tmp_path, (2,))
    small.train()
    path, recorded = last(small).path, last(small).weights_digest
    info = json.loads((path / INFO).read_text())
    del info["sha256"], info["weights_digest"]
    (path / INFO).write_text(json.dumps({**info, "sha256": fingerprint(info)}))
    old = read_checkpoint(path)
    assert old.weights_digest is None and weights_digest(old) == recorded
    expected = fingerprint({"files": info["files"], "run": info["run_fingerprint"], "step": 2})
    assert old.digest == expected
    promote(old, "t1", {})
    assert "weights_digest" not in json.loads((path / INFO).read_text())
    assert read_checkpoint(path).milestone == "t1" and (path / COMPLETE).exists()


def test_old_files_that_are_damaged_are_not_hashed(tmp_path: Path):
    small = SmallRun(tmp_path, (2,))
    small.train()
    (data,) = last(small).path.glob("*.distcp")
    broken = bytearray(data.read_bytes())
    broken[-1] ^= 1
    data.write_bytes(broken)
    with pytest.raises(DataError, match="damaged"):
        from_files(last(small))
