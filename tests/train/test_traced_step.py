"""A step of the shipped recipes on 8, 64 and 256 pretended ranks: it runs, and takes what a dry run says."""

import pytest
from traced_step import PER_NODE, Traced, shortened, trace

from openlm_pipeline.experiments import Experiment, load_experiment
from openlm_pipeline.runs.dry_run import describe
from openlm_pipeline.runs.estimates import estimate_memory
from openlm_pipeline.runs.traffic import estimate_traffic


def check(experiment: Experiment, processes: int) -> Traced:
    traced = trace(experiment, processes)
    assert traced.peak == pytest.approx(estimate_memory(experiment, processes, PER_NODE).total, rel=0.05)
    traffic = estimate_traffic(experiment, processes, PER_NODE)
    assert (traced.gathered, traced.reduced) == pytest.approx((traffic.gathered, traffic.reduced), rel=1e-3)
    assert not traced.waits
    return traced


@pytest.mark.parametrize("processes", [8, 64, 256])
@pytest.mark.parametrize("size", ["160m", "411m", "1b", "7b"])
def test_a_step_takes_what_is_computed(size: str, processes: int):
    check(shortened(f"pretrain_{size}", processes), processes)


SMALL = ["model.n_layers=3", "training.global_batch=131072", "execution.micro_batch=4"]


@pytest.mark.parametrize(
    "overrides",
    [
        ["execution.activation_checkpointing=selective"],
        ["execution.activation_checkpointing=full"],
        ["execution.activation_checkpointing=full", "model.vocab_size=2048"],
        ["execution.reshard_after_forward=false"],
        ["execution.loss_chunk=512"],
        ["training.state_precision=bf16"],
        ["training.precision=fp32", "training.z_loss=1e-4"],
        ["training.optimizer=muon", "training.averages=[ema_0.99]"],
        ["model.qk_norm=true", "model.weight_tying=true"],
        ["model.ffn=gelu", "model.positional_embedding=none"],
        ["model.n_kv_heads=4", "model.ffn_hidden_dim=8192"],
    ],
    ids=lambda overrides: overrides[0].partition(".")[2],
)
def test_settings_take_what_is_computed(overrides: list[str]):
    check(shortened("pretrain_1b", 8, *SMALL, *overrides), 8)


def test_the_smallest_model_takes_what_is_computed_and_more_chunks_of_the_loss_no_more():
    """Chunks once kept their logits for a z-loss that was off."""
    peaks = [check(shortened("pretrain_11m", 1, f"execution.loss_chunk={size}"), 1).peak for size in (2048, 8192)]
    assert peaks[0] < peaks[1]


@pytest.mark.parametrize("size", ["1b", "3b", "7b"])
def test_256_gpus_keep_97_percent_of_the_speed_of_one(size: str):
    cost = describe(load_experiment(f"pretrain_{size}"), 256, "H100", 0.5)
    step_seconds = cost.seconds / cost.steps
    assert 0 < cost.traffic.exposed_seconds < 0.03 * step_seconds < cost.traffic.seconds
    assert f"{cost.traffic.exposed_seconds / step_seconds:.1%}" in cost.traffic_line()
    slow = describe(load_experiment(f"pretrain_{size}"), 256, "H100", 0.5, bandwidth=5e9)
    assert slow.traffic.exposed_seconds > 0.03 * step_seconds
