"""What a dry run says: exact counts, memory against what a process really takes, and data that is there or not."""

import gc
import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from small_run import SmallRun
from torch.profiler import ProfilerActivity, profile

from openlm_pipeline.errors import ConfigError
from openlm_pipeline.experiments import Experiment, load_experiment
from openlm_pipeline.models import create_model
from openlm_pipeline.models.init import initialize
from openlm_pipeline.runs.dry_run import describe
from openlm_pipeline.runs.estimates import estimate_memory
from openlm_pipeline.storage.home import Home
from train.distributed import leave_process_group, start
from train.optimizers import make_optimizer
from train.parallel import build_model

RECIPES = ["demo"] + [f"pretrain_{size}" for size in ("11m", "25m", "87m", "160m", "411m", "830m", "1b", "3b", "7b")]


def test_a_small_run_is_counted_exactly(small: SmallRun):
    plan = describe(small.experiment(), 1, home=small.home)
    model = create_model(plan.model, device="meta")
    assert plan.parameters == sum(p.numel() for p in model.parameters())
    assert (plan.steps, plan.tokens, plan.samples) == (8, 2048, 64)
    needed_and_there = {d.name: (d.samples_needed, d.samples_there) for d in plan.data}
    assert needed_and_there == {"text": (48, 301), "code": (16, 67)}
    assert plan.seconds is None
    text = "\n".join(plan.lines())
    assert "8 steps of 8 sequences of 32 tokens, 64 samples" in text
    assert "16 samples, 512 tokens, needed; 67 there, so 0.239 epochs" in text


def test_the_size_of_a_checkpoint_is_what_one_takes_on_disk(small: SmallRun):
    small.train("training.averages=[ema_0.9_2]")
    plan = describe(small.experiment("training.averages=[ema_0.9_2]"), 1, home=small.home)
    (folder,) = small.run.checkpoints.glob("step-00000008")
    on_disk = sum(p.stat().st_size for p in folder.rglob("*.distcp"))
    overhead = 250_000  # names, shapes and step counters of each tensor; nothing beside weights of a real model
    assert plan.checkpoint_bytes <= on_disk < plan.checkpoint_bytes + overhead


def test_data_that_is_not_there_is_said_not_needed(small: SmallRun, tmp_path: Path):
    plan = describe(small.experiment(), 2, home=Home(tmp_path / "empty"))
    assert [d.samples_there for d in plan.data] == [None, None]
    assert "no whole shards there (`openlm tokenize` makes them)" in "\n".join(plan.lines())


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_shipped_recipe_can_be_described(recipe: str, tmp_path: Path):
    experiment = load_experiment(recipe, [])
    plan = describe(experiment, experiment.launcher.processes, "H100", 0.4, Home(tmp_path))
    model = create_model(plan.model, device="meta")
    assert plan.parameters == sum(p.numel() for p in model.parameters())
    assert plan.tokens >= experiment.milestones[-1]
    assert plan.seconds > 0


def test_hours_are_operations_over_what_the_devices_reach(tmp_path: Path):
    """DCLM's 1B: 28 B tokens at 9.23 GFLOP a token are 72.5 h of an H100 at its full peak."""
    experiment = load_experiment("pretrain_1b", ["milestones=[28B]", "training.warmup=1B"])
    plan = describe(experiment, 8, "NVIDIA H100 80GB HBM3", 0.5, Home(tmp_path))
    assert plan.seconds * plan.processes * plan.mfu / 3600 == pytest.approx(28e9 * 9.23e9 / 989.4e12 / 3600, rel=1e-3)
    assert "at 50% MFU on 8 x NVIDIA H100 80GB HBM3" in "\n".join(plan.lines())


@pytest.mark.parametrize(
    ("processes", "device", "mfu", "overrides", "message"),
    [
        (1, "Voodoo 2", 0.4, [], "no peak in fp32 is known for the device 'Voodoo 2'; known: B200"),
        (1, "V100", 0.4, ["training.precision=bf16"], "no peak in bf16"),
        (1, "H100", 40.0, [], "MFU is a share"),
        (3, None, 0.4, [], "8 sequences does not divide over 3 processes"),
        (16, None, 0.4, [], "8 sequences does not divide over 16 processes"),
    ],
)
def test_what_cannot_be_is_refused(small: SmallRun, processes, device, mfu, overrides, message: str):
    with pytest.raises(ConfigError, match=message):
        describe(small.experiment(*overrides), processes, device, mfu, small.home)


def test_memory_changes_with_what_saves_or_spends_it():
    batch = "training.global_batch=131072"
    plain = estimate_memory(load_experiment("pretrain_1b", [batch, "execution.micro_batch=8"]), 8)
    for override, part in {
        "execution.activation_checkpointing=full": "activations",
        "execution.activation_checkpointing=selective": "activations",
        "execution.micro_batch=4": "activations",
        "execution.loss_chunk=512": "working",
        "training.state_precision=bf16": "optimizer",
        "training.optimizer=muon": "optimizer",
    }.items():
        changed = estimate_memory(load_experiment("pretrain_1b", [batch, "execution.micro_batch=8", override]), 8)
        assert asdict(changed)[part] < asdict(plain)[part], override
    for override, part in {
        "execution.replicas=2": "weights",
        "execution.reshard_after_forward=false": "gathered",
        "training.averages=[ema_0.99]": "averages",
        "execution.micro_batch=4": "gradients",
    }.items():
        changed = estimate_memory(load_experiment("pretrain_1b", [batch, "execution.micro_batch=8", override]), 8)
        assert asdict(changed)[part] > asdict(plain)[part], override


def measured_peak(experiment: Experiment, trace: Path) -> int:
    """Bytes of tensors that are alive at one time, at most, while a model is made and trained for two steps."""
    gc.collect()  # what earlier tests left in cycles would be freed, and counted, while this is measured
    world = start()
    try:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            model = build_model(experiment, world)
            initialize(model, model.config, experiment.seed)
            optimizer = make_optimizer(experiment.training, model)
            sequences = experiment.training.global_batch // experiment.seq_len
            ids = torch.randint(0, model.config.vocab_size, (sequences, experiment.seq_len + 1))
            for _ in range(2):
                micro_batches = ids.split(experiment.execution.micro_batch or sequences)
                for i, micro in enumerate(micro_batches):
                    model.set_requires_gradient_sync(i == len(micro_batches) - 1)
                    loss_sum, z_sum = model(micro[:, :-1], micro[:, 1:])
                    ((loss_sum + 1e-4 * z_sum) / experiment.training.global_batch).backward()
                optimizer.step()
                optimizer.zero_grad()
    finally:
        leave_process_group()
    profiler.export_chrome_trace(str(trace))
    events = json.loads(trace.read_text())["traceEvents"]
    memory = [e["args"] for e in sorted(events, key=lambda e: e.get("ts", 0)) if e["name"] == "[memory]"]
    before = memory[0]["Total Allocated"] - memory[0]["Bytes"]  # what earlier profiles of this process saw no end of
    return max(m["Total Allocated"] for m in memory) - before


ACTIVATIONS_RULE = [
    'model={"hidden_dim": 128, "n_layers": 4, "n_heads": 4, "vocab_size": 1024}',
    "seq_len=128", "training.global_batch=2048", "milestones=[4096]",
]  # fmt: skip
LOGITS_RULE = [
    'model={"hidden_dim": 64, "n_layers": 2, "n_heads": 2, "vocab_size": 16384}',
    "seq_len=128", "training.global_batch=1024", "milestones=[2048]",
]  # fmt: skip
WEIGHTS_RULE = [
    'model={"hidden_dim": 512, "n_layers": 3, "n_heads": 4, "vocab_size": 1024}',
    "seq_len=128", "training.global_batch=256", "milestones=[512]",
]  # fmt: skip


@pytest.mark.parametrize(
    "overrides",
    [
        ACTIVATIONS_RULE,
        [*ACTIVATIONS_RULE, "execution.activation_checkpointing=selective"],
        [*ACTIVATIONS_RULE, "execution.activation_checkpointing=full"],
        LOGITS_RULE,
        [*LOGITS_RULE, "execution.loss_chunk=512"],
        WEIGHTS_RULE,
        [*WEIGHTS_RULE, "execution.micro_batch=1"],
        [*WEIGHTS_RULE, "execution.reshard_after_forward=false"],
    ],
    ids=["plain", "selective", "full", "logits", "chunks", "weights", "summed", "gathered"],
)
def test_memory_is_what_a_process_takes(small: SmallRun, overrides: list[str], tmp_path: Path):
    experiment = small.experiment(*overrides)
    estimate = estimate_memory(experiment, 1).total
    measured = measured_peak(experiment, tmp_path / "trace.json")
    print(f"measured {measured / 1e6:.1f} MB, estimated {estimate / 1e6:.1f} MB: {estimate / measured:.2f}")
    assert measured == pytest.approx(estimate, rel=0.1)
