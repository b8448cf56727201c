"""A run's identity: what changes its weights is in it, where and how it runs is not."""

from typing import Any

import pytest

from openlm_pipeline.experiments import Experiment
from openlm_pipeline.fingerprint import differences, fingerprint
from openlm_pipeline.registry import SAMPLINGS
from openlm_pipeline.runs.identity import run_identity

VERSIONS = {"text": "1" * 64, "other": "2" * 64, "held_out": "3" * 64}
USUAL: dict[str, Any] = {
    "name": "run",
    "tokenizer": {"name": "bpe", "train": {"vocab_size": 300}},
    "seq_len": 16,
    "sources": [{"name": "text", "files": ["a"]}, {"name": "other", "files": ["b"], "weight": 2.0}],
    "model": {"hidden_dim": 8, "n_layers": 1, "n_heads": 1},
    "training": {"global_batch": 64, "lr": 1e-3},
    "milestones": ["1K", "2K"],
}


def identity(versions: dict[str, str] = VERSIONS, **changes: Any) -> dict[str, Any]:
    return run_identity(Experiment(**{**USUAL, **changes}), versions)


def test_a_sampling_that_reads_a_setting_of_all_takes_it_from_no_identity(monkeypatch: pytest.MonkeyPatch) -> None:
    before = identity()
    monkeypatch.setattr(SAMPLINGS["windowed"], "settings", ("window_shards", "lr"))
    assert identity() == before
    assert before["training"]["lr"] == 1e-3 and "window_shards" not in before["training"]


def test_it_has_a_fingerprint() -> None:
    assert fingerprint(identity()) == fingerprint(identity())


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"seed": 1}, "seed 0 -> 1"),
        ({"training": {"global_batch": 64, "lr": 2e-3}}, "training.lr 0.001 -> 0.002"),
        ({"training": {"global_batch": 128, "lr": 1e-3}}, "training.global_batch 64 -> 128"),
        ({"model": {"hidden_dim": 16, "n_layers": 1, "n_heads": 1}}, "model.hidden_dim 8 -> 16"),
        ({"milestones": ["1K", "3K"]}, "training.horizon 2000 -> 3000"),
        ({"versions": {**VERSIONS, "other": "4" * 64}}, f"data[1].manifest_sha256 {'2' * 64} -> {'4' * 64}"),
        ({"sources": [USUAL["sources"][0], {**USUAL["sources"][1], "weight": 3.0}]}, "data[1].weight 2.0 -> 3.0"),
    ],
)
def test_what_changes_weights_is_in_it(changes: dict[str, Any], field: str) -> None:
    assert field in differences(identity(), identity(**changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"description": "other words"},
        {"version": "v2"},
        {"execution": {"micro_batch": 1, "checkpoint_every": "1K", "log_every": 3}},
        {"launcher": {"processes": 8}},
        {"evaluation": {"suite": "demo"}},
        {"validation": {"source": {"name": "held_out", "files": ["c"]}}},
        {"milestones": ["0.5K", "2K"]},
    ],
)
def test_what_does_not_change_weights_is_not(changes: dict[str, Any]) -> None:
    assert identity(**changes) == identity()


def test_a_constant_schedule_can_be_extended() -> None:
    constant = {"training": {"global_batch": 64, "lr": 1e-3, "schedule": "constant"}}
    assert identity(**constant, milestones=["1K", "2K", "9K"]) == identity(**constant)
