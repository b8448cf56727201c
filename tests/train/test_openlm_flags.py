"""OpenLM's command line: every flag has its effect, is accepted with a word, or is refused with a reason."""

import json
from pathlib import Path
from typing import Any

import pytest

from openlm_pipeline.errors import ConfigError
from openlm_pipeline.storage.home import Home
from train.openlm.flag_table import FLAGS
from train.openlm.flags import OpenLMRun, translate
from train.openlm.parser import parse

ALL_FLAGS = """
train-data train-data-mix-weights train-data-upsampling-factors val-data val-data-key val-num-samples data-key
train-num-samples dataset-type dataset-resampled dataset-manifest dataset-metadata disable-buffer logs log-local name
workers global-batch-size batch-size global-val-batch-size epochs epochs-cooldown optimizer lr beta1 beta2 eps wd warmup
z-loss-coefficient log-logit-mean skip-scheduler lr-scheduler lr-cooldown-end lr-cooldown-power force-min-lr
save-frequency save-most-recent torchcompile val-frequency val-seq-ci val-tok-ci val-max-pop-ci val-iter-ci resume
precision model model-norm qk-norm ffn-type positional-embedding-type attn-name attn-activation attn-seq-scalar
attn-seq-scalar-alpha moe-freq moe-num-experts moe-weight-parallelism moe-expert-model-parallelism moe-capacity-factor
moe-loss-weight moe-top-k hf-model hf-seq-len hf-fsdp-block pretrained load-pretrained-state grad-checkpointing
accum-freq dist-url dist-backend no-set-device-rank fsdp fsdp-amp fsdp-cpu-offload fsdp-use-orig-params
fsdp-backward-prefetch fsdp-hybrid fsdp-limit-all-gathers fsdp-pure-bf16 fsdp-hybrid-o2 fsdp-checkpoint use-bn-sync
torchscript trace distill-model distill-pretrained use-bnb-linear report-to wandb-notes wandb-project-name debug
copy-codebase ddp-static-graph average average-coefficients averagers log-avg-model-training-loss seed grad-clip-norm
log-every-n-steps remote-sync remote-sync-frequency remote-sync-protocol delete-previous-checkpoint target-mask-left
target-mask-individual squash-mask-left ignore-parse-errors experimental-meta-device force-distributed
preset-world-size multiple-data-passes data-tolerate-error-p data-tolerate-num-ckpts config
"""
"""The flags of `params.py` at OpenLM's head, and the two names of August 2023."""

SYNTHETIC = ("--model", "open_lm_11m", "--dataset-type", "synthetic", "--train-num-samples", "1000000", "--epochs", "4")
EPOCH = 1_000_000


def run_of(tmp_path: Path, *arguments: str, world_size: int = 1, local: int = 1) -> OpenLMRun:
    usual = () if "--train-data" in arguments or "--dataset-manifest" in arguments else SYNTHETIC
    values = parse(["--logs", str(tmp_path / "logs"), "--name", "run", *usual, *arguments])
    return translate(values, Home(tmp_path / "home"), world_size=world_size, local_world_size=local)


def at(run: OpenLMRun, path: str) -> Any:
    value: Any = run.experiment.model_dump(mode="json")
    for part in path.split("."):
        value = value[int(part) if part.isdecimal() else part]
    return value


BATCH = 64 * 2048  # tokens per step by default
EFFECTS: list[tuple[str, str, Any]] = [  # flags, field of the experiment, its value
    ("--dataset-type synthetic", "sources.0.shards", "synthetic://488/0"),
    ("--train-num-samples 2000000", "milestones", [2_000_000, 4_000_000, 6_000_000, 8_000_000]),
    ("--epochs 2", "milestones", [EPOCH, 2 * EPOCH]),
    ("--save-frequency 3", "milestones", [3 * EPOCH, 4 * EPOCH]),
    ("--delete-previous-checkpoint", "milestones", [4 * EPOCH]),
    ("--delete-previous-checkpoint --save-frequency 2", "execution.checkpoint_every", 2 * EPOCH),
    ("--delete-previous-checkpoint", "execution.keep_checkpoints", 1),
    ("--dataset-resampled", "training.sampling", "resampled"),
    ("--workers 8", "execution.prefetch_batches", 16),
    ("--model open_lm_25m", "model.name", "open_lm_25m"),
    ("--model-norm gain_only_lp_layer_norm", "model.norm", "gain_only_lp_layer_norm"),
    ("--qk-norm", "model.qk_norm", True),
    ("--ffn-type gelu", "model.ffn", "gelu"),
    ("--positional-embedding-type head_rotary", "model.positional_embedding", "head_rotary"),
    ("--global-batch-size 16", "training.global_batch", 16 * 2048),
    ("--batch-size 4", "training.global_batch", 4 * 2048),
    ("--batch-size 4", "training.source_batch", 4),
    ("--accum-freq 4", "execution.micro_batch", 16),
    ("--lr 3e-4", "training.lr", 3e-4),
    ("--lr 3e-4", "training.schedule", "cosine"),
    ("--lr-scheduler const", "training.schedule", "constant"),
    ("--lr-scheduler const-cooldown --epochs-cooldown 1 --warmup 3", "training.schedule", "wsd"),
    ("--lr-scheduler const-cooldown --epochs-cooldown 1 --warmup 3", "training.decay", EPOCH),
    (
        "--lr-scheduler const-cooldown --epochs-cooldown 1 --warmup 3 --lr-cooldown-power 0.5",
        "training.decay_power",
        0.5,
    ),
    ("--warmup 3", "training.warmup", 3 * BATCH),
    ("--warmup 3", "training.horizon", 4 * EPOCH),
    ("--warmup 2000", "training.horizon", 2000 * BATCH),  # still rising at the end of training
    ("--lr-cooldown-end 3e-5", "training.lr_min", 3e-5),
    ("--force-min-lr 1e-5", "training.lr_floor", 1e-5),
    ("--skip-scheduler", "training.schedule", "constant"),
    ("--skip-scheduler --warmup 9", "training.warmup", 0),
    ("--beta1 0.8", "training.beta1", 0.8),
    ("--beta2 0.999", "training.beta2", 0.999),
    ("--lr 1e-3", "training.beta2", 0.95),
    ("--eps 1e-6", "training.eps", 1e-6),
    ("--wd 0.1", "training.weight_decay", 0.1),
    ("--lr 1e-3", "training.weight_decay", 0.2),
    ("--grad-clip-norm 1", "training.grad_clip", 1.0),
    ("--lr 1e-3", "training.grad_clip", None),
    ("--z-loss-coefficient 1e-4", "training.z_loss", 1e-4),
    ("--target-mask-left 50300", "training.mask_left", 50300),
    ("--target-mask-individual -1", "training.mask_token", 50431),
    ("--squash-mask-left --target-mask-left 1 --target-mask-individual 2", "training.squash_mask_left", True),
    ("--averagers poly_8_1,ema_0.9999_10", "training.averages", ["poly_8_1", "ema_0.9999_10"]),
    ("--seed 7", "seed", 7),
    ("--seed 7", "sources.0.shards", "synthetic://488/7"),
    ("--precision fp32", "training.precision", "fp32"),
    ("--precision amp_bfloat16", "training.precision", "bf16"),
    ("--precision amp_bf16", "training.precision", "bf16"),
    ("--precision fp32 --fsdp --fsdp-amp", "training.precision", "bf16"),
    ("--grad-checkpointing", "execution.activation_checkpointing", "full"),
    ("--torchcompile", "execution.compile", True),
    ("--log-every-n-steps 5", "execution.log_every", 5),
    ("--report-to wandb", "execution.report_to", ["wandb"]),
    ("--report-to tensorboard", "execution.report_to", ["tensorboard"]),
    ("--report-to all", "execution.report_to", ["wandb", "tensorboard"]),
    ("--wandb-project-name mine", "execution.wandb_project", "mine"),
    ("--remote-sync s3://bucket/runs", "execution.upload_to", "s3://bucket/runs"),
]
ELSEWHERE = {  # live flags whose effect the tests below, and those of real runs, are about
    "train-data", "train-data-mix-weights", "dataset-manifest", "dataset-metadata", "data-key", "val-data",
    "val-data-key", "val-num-samples", "val-frequency", "val-seq-ci", "disable-buffer", "pretrained", "average",
    "average-coefficients", "fsdp", "fsdp-hybrid", "fsdp-hybrid-o2", "name", "logs", "resume", "wandb-notes", "config",
}  # fmt: skip


def test_every_flag_of_openlm_is_known_and_no_other():
    assert sorted(flag.name for flag in FLAGS.values()) == sorted(ALL_FLAGS.split())


def test_every_live_flag_has_a_test_of_its_effect():
    named = {word.removeprefix("--") for flags, _, _ in EFFECTS for word in flags.split() if word.startswith("--")}
    live = {flag.name for flag in FLAGS.values() if flag.kind == "live"}
    assert live - named == ELSEWHERE - named
    assert live >= ELSEWHERE


@pytest.mark.parametrize(("flags", "path", "value"), EFFECTS)
def test_a_live_flag_has_its_effect(tmp_path: Path, flags: str, path: str, value: Any):
    assert at(run_of(tmp_path, *flags.split()), path) == value


@pytest.mark.parametrize("flag", [f for f in FLAGS.values() if f.kind == "refused"], ids=lambda f: f.name)
def test_a_refused_flag_ends_with_its_reason_unless_it_says_nothing_new(flag):
    another = [] if flag.type is bool else ["7"]
    with pytest.raises(ConfigError) as refusal:
        parse([f"--{flag.name}", *another])
    assert f"--{flag.name}: {flag.note}" in str(refusal.value)
    if flag.type is not bool and flag.default is not None:
        assert getattr(parse([f"--{flag.name}", str(flag.default)]), flag.key) == flag.default


@pytest.mark.parametrize("flag", [f for f in FLAGS.values() if f.kind == "always"], ids=lambda f: f.name)
def test_a_flag_for_what_is_so_anyway_changes_nothing_and_is_told(tmp_path: Path, flag):
    other = {"attn-name": "torch_attn", "dist-backend": "gloo", "remote-sync-protocol": "fsspec"}
    value = [] if flag.type is bool else [other.get(flag.name, str(flag.default or 4))]
    run = run_of(tmp_path, f"--{flag.name}", *value)
    assert run.experiment == run_of(tmp_path).experiment
    if value != [str(flag.default)]:
        assert any(note.startswith(f"--{flag.name}: ") for note in run.notes)


def test_amp_is_bfloat16_and_says_so(tmp_path: Path):
    run = run_of(tmp_path)
    assert run.experiment.training.precision == "bf16"
    assert any("float16" in note for note in run.notes)
    assert run_of(tmp_path, "--precision", "amp_bfloat16").notes == ()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--precision fp16", "computes in fp32 in OpenLM"),
        ("--precision bf16", "amp_bfloat16"),
        ("--batch-size 4 --global-batch-size 8", "not both"),
        ("--accum-freq 7", "do not divide"),
        ("--fsdp-amp", "need --fsdp"),
        ("--epochs-cooldown 1", "const-cooldown only"),
        ("--lr-scheduler const-cooldown", "needs --epochs-cooldown"),
        ("--resume /there/epoch_3.pt", "--pretrained"),
        ("--report-to mlflow", "wandb, tensorboard or all"),
        ("--pretrained a.pt --average b.pt", "one of them"),
        ("--average a.pt b.pt --average-coefficients 1", "as many as"),
        ("--disable-buffer", "--dataset-manifest"),
        ("--logs s3://bucket/logs", "--remote-sync"),
        ("--model open_lm_4b", "did you mean"),
        ("--epochs 0", "at least 1"),
        ("--val-data a/x b/y c/z --val-data-key txt txt", "2 --val-data-key for 3 sources"),
        ("--train-num-samples 1000", "an epoch of 1,000 tokens .* is under a step of 131,072"),
        ("--log-every-n-step 5", "did you mean --log-every-n-steps?"),
        ("--lr fast", "--lr"),
        ("--train-data pipe:aws", "shell command"),
    ],
)
def test_what_cannot_be_is_refused_in_words(tmp_path: Path, flags: str, words: str):
    with pytest.raises(ConfigError, match=words.replace("?", r"\?")):
        run_of(tmp_path, *flags.split())


def test_without_a_source_there_is_nothing_to_train():
    with pytest.raises(ConfigError, match="--train-data or --dataset-manifest"):
        translate(parse(["--model", "open_lm_11m"]), Home(Path("home")))


def test_batches_and_groups_follow_the_number_of_processes(tmp_path: Path):
    four = {"world_size": 4, "local": 2}
    assert run_of(tmp_path, "--batch-size", "8", **four).experiment.training.global_batch == 32 * 2048
    assert run_of(tmp_path, "--global-batch-size", "8", **four).experiment.execution.micro_batch == 2
    with pytest.raises(ConfigError, match="does not divide over 4"):
        run_of(tmp_path, "--global-batch-size", "6", **four)
    replicas = {
        flags: run_of(tmp_path, *flags.split(), **four).experiment.execution.replicas
        for flags in ("", "--fsdp", "--fsdp --fsdp-hybrid", "--fsdp --fsdp-hybrid-o2")
    }
    assert list(replicas.values()) == [4, 1, 2, 2]
    assert not run_of(tmp_path, "--fsdp", "--fsdp-hybrid-o2").experiment.execution.reshard_after_forward
    assert run_of(tmp_path, "--fsdp").experiment.execution.reshard_after_forward


def test_the_run_is_in_logs_under_its_name(tmp_path: Path):
    run = run_of(tmp_path, "--name", "open_lm_ex_31415.A", "--resume", "latest")
    assert run.run_path == tmp_path / "logs" / "open_lm_ex_31415.A"
    assert run.experiment.name == "open_lm_ex_31415_a"
    values = parse(["--logs", str(tmp_path), *SYNTHETIC, "--lr", "0.001", "--batch-size", "8"])
    named = translate(values, Home(tmp_path))
    assert named.run_path.parent == tmp_path
    assert named.run_path.name.endswith("-model_open_lm_11m-lr_0.001-b_8")
    assert translate(values, Home(tmp_path)).run_path == named.run_path


def test_a_json_model_config_wins_over_flags(tmp_path: Path):
    path = tmp_path / "mine.json"
    sizes = {"hidden_dim": 32, "n_layers": 1, "n_heads": 2, "seq_len": 64, "vocab_size": 300}
    path.write_text(json.dumps({**sizes, "model_norm": "rms_norm"}))
    flags = ("--model", str(path), "--model-norm", "gain_only_layer_norm", "--qk-norm")
    model = run_of(tmp_path, *flags).experiment.model_config_resolved()
    assert (model.norm, model.qk_norm, model.vocab_size) == ("rms_norm", True, 300)


def test_weights_to_begin_with(tmp_path: Path):
    assert run_of(tmp_path).initial_weights == {}
    assert run_of(tmp_path, "--pretrained", "/w/a.pt").initial_weights == {Path("/w/a.pt"): 1.0}
    average = ("--average", "/w/a.pt", "/w/b.pt")
    assert run_of(tmp_path, *average).initial_weights == {Path("/w/a.pt"): 0.5, Path("/w/b.pt"): 0.5}
    given = run_of(tmp_path, *average, "--average-coefficients", "0.75", "0.25").initial_weights
    assert list(given.values()) == [0.75, 0.25]


@pytest.mark.parametrize("suffix", ["yaml", "json"])
def test_a_file_of_flags_takes_the_place_of_the_line(tmp_path: Path, suffix: str):
    path = tmp_path / f"flags.{suffix}"
    flags = {
        "model": "open_lm_11m", "dataset-type": "synthetic", "train_num_samples": EPOCH, "epochs": 4, "lr": 0.001,
        "qk_norm": True, "name": "run", "logs": str(tmp_path / "logs"), "optimizer": "adamw", "target_mask_left": None,
        "train_data": None, "remote-sync-frequency": 300,
    }  # fmt: skip
    path.write_text(json.dumps(flags))
    made = translate(parse(["--config", str(path)]), Home(tmp_path / "home"))
    assert made.experiment == run_of(tmp_path, "--lr", "0.001", "--qk-norm").experiment
    with pytest.raises(ConfigError, match="--lr"):
        parse(["--config", str(path), "--lr", "1"])
    for bad, words in (
        ({"learning_rate": 1}, "unknown flag"),
        ({"epochs": "many"}, "'many' is not int"),
        ({"qk_norm": 1}, "not true or false"),
        ({"precision": "int8"}, "not one of"),
        ({"moe-freq": 2}, "mixture-of-experts"),
    ):
        path.write_text(json.dumps(bad))
        with pytest.raises(ConfigError, match=words):
            parse(["--config", str(path)])


def test_params_txt_has_every_flag_sorted(tmp_path: Path):
    lines = run_of(tmp_path, "--lr", "0.001").params_text().splitlines()
    assert "lr: 0.001" in lines
    assert [line.partition(":")[0] for line in lines] == sorted(FLAGS)
