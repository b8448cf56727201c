"""OpenLM's command line: `-m train --model open_lm_1b --train-data ...` as an experiment and where it runs.

An epoch is `--train-num-samples` tokens, as there, and each `--save-frequency` epochs end in a checkpoint. The run's
folder is LOGS/NAME. What each flag does, or why it is refused, stands in `train.openlm.flag_table`.
"""

import argparse
import hashlib
import os
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from pydantic import ValidationError

from openlm_pipeline.errors import ConfigError
from openlm_pipeline.experiments import Experiment
from openlm_pipeline.models import find_config
from openlm_pipeline.shards.foreign import PIPE, expand, first_member, is_list
from openlm_pipeline.shards.manifest import DATASET, MANIFEST
from openlm_pipeline.shards.opening import open_dataset
from openlm_pipeline.shards.synthetic import SCHEME
from openlm_pipeline.storage.home import Home
from openlm_pipeline.storage.remote import join
from openlm_pipeline.strict import explain
from openlm_pipeline.tokenizers.tokenizer import default_tokenizer
from train.openlm.flag_table import FLAGS

_DEFAULT_GLOBAL_BATCH = 64
_ALL_SAMPLES = 1 << 40
_MODEL_FLAGS = {  # OpenLM's key in a JSON config: (flag, field of ModelConfig)
    "model_norm": "norm",
    "qk_norm": "qk_norm",
    "ffn_type": "ffn",
    "positional_embedding_type": "positional_embedding",
}


@dataclass(frozen=True)
class OpenLMRun:
    """What a command line of OpenLM stands for."""

    experiment: Experiment
    run_path: Path
    """LOGS/NAME."""
    params: dict[str, Any]
    """Every flag with its value, as OpenLM's `params.txt` has them."""
    notes: tuple[str, ...]
    """What is otherwise than in OpenLM, for people."""
    initial_weights: dict[Path, float]
    """Checkpoints that the weights begin with the sum of, each times its coefficient."""

    def params_text(self) -> str:
        return "".join(f"{key}: {value}\n" for key, value in sorted(self.params.items()))


def translate(values: argparse.Namespace, home: Home, *, world_size: int = 1, local_world_size: int = 1) -> OpenLMRun:
    """The run that flags stand for.

    Args:
        values: of `train.openlm.parser.parse`.
        home: where converted shards are kept.
        world_size: processes in all.
        local_world_size: processes on a machine.

    Raises:
        ConfigError: flags contradict each other, or a value is out of range.
        MissingInputError, DataError: the data is not there or can't be read.
    """
    model, config = _model(values)
    mask_left, mask_token = (
        v + config.vocab_size if v is not None and v < 0 else v
        for v in (values.target_mask_left, values.target_mask_individual)
    )
    local_batch = _local_batch(values, world_size)
    global_batch = local_batch * world_size * config.seq_len
    settings = (config.seq_len, config.vocab_size, mask_token)
    sources, held_out_sources = _sources(values, home, settings), _held_out(values, home, settings)
    document: dict[str, Any] = {
        "name": _slug(values.name or f"openlm {values.model}"),
        "description": "from OpenLM's command line",
        "tokenizer": {"name": "gpt_neox_20b", "source": default_tokenizer()},
        "seq_len": config.seq_len,
        "sources": sources,
        "pad_id": mask_token,
        "seed": values.seed,
        "model": model,
    }
    execution = _execution(values, local_batch, world_size, local_world_size)
    run_path = (Path(values.logs) / (values.name or _date_name(values, local_batch))).absolute()

    def experiment(epoch: int) -> Experiment:
        training = {
            **_training(values, epoch, global_batch),
            "mask_left": mask_left,
            "mask_token": mask_token,
            "sampling": _sampling(values, sources),
        }
        held_out = {
            "sources": held_out_sources,
            "every": values.val_frequency * epoch,
            "intervals": values.val_seq_ci,
            "max_samples": values.val_num_samples // config.seq_len if values.val_num_samples else _ALL_SAMPLES,
        }
        ends = range(values.save_frequency, values.epochs, values.save_frequency)
        save_at = [epoch * n for n in (*ends, values.epochs)]
        rotating = {"checkpoint_every": epoch * values.save_frequency, "keep_checkpoints": 1}
        return Experiment(
            **document,
            training=training,
            validation=held_out if held_out_sources else None,
            milestones=save_at[-1:] if values.delete_previous_checkpoint else save_at,
            execution={**execution, **(rotating if values.delete_previous_checkpoint else {})},
        )

    try:
        epoch = values.train_num_samples
        if epoch is None:  # all there is, which is known once the data is open
            datasets = experiment(global_batch).training_datasets()
            epoch = sum(len(open_dataset(d, home)) for d in datasets) * config.seq_len
        if epoch < global_batch:
            raise ConfigError(f"an epoch of {epoch:,} tokens (--train-num-samples) is under a step of {global_batch:,}")
        made = experiment(epoch)
    except ValidationError as e:
        raise explain(e, "what OpenLM's flags stand for") from e
    given = vars(values)
    notes = [f"--{f.name}: {f.note}" for f in FLAGS.values() if f.kind == "always" and given[f.key] != f.default]
    if values.precision == "amp":
        notes.append("--precision amp: bfloat16, which needs no loss scaling, and not OpenLM's float16")
    return OpenLMRun(made, run_path, given, tuple(notes), _weights(values))


def _model(values: argparse.Namespace) -> tuple[dict[str, Any], Any]:
    """(the experiment's `model`, its full config). What a model's JSON config says wins over flags, as in OpenLM."""
    said = find_config(values.model).model_fields_set
    fields = {field: getattr(values, key) for key, field in _MODEL_FLAGS.items() if field not in said}
    config = find_config(values.model, **fields)
    is_file = values.model.endswith(".json")
    return (config.model_dump() if is_file else {"name": values.model, **fields}), config


def _local_batch(values: argparse.Namespace, world_size: int) -> int:
    """Sequences per step of each process."""
    if values.batch_size is not None and values.global_batch_size is not None:
        raise ConfigError("give --global-batch-size (over all processes) or --batch-size (of each), not both")
    local = values.batch_size
    if local is None:
        everywhere = values.global_batch_size if values.global_batch_size is not None else _DEFAULT_GLOBAL_BATCH
        if everywhere % world_size:
            raise ConfigError(f"--global-batch-size {everywhere} does not divide over {world_size} processes")
        local = everywhere // world_size
    if local < 1 or values.accum_freq < 1 or local % values.accum_freq:
        raise ConfigError(f"the {local} sequences of a process do not divide into --accum-freq {values.accum_freq}")
    return local


def _training(values: argparse.Namespace, epoch: int, global_batch: int) -> dict[str, Any]:
    if min(values.epochs, values.save_frequency, values.val_frequency) < 1:
        raise ConfigError("--epochs, --save-frequency and --val-frequency are at least 1")
    schedule: dict[str, Any] = {"schedule": "constant"}
    if not values.skip_scheduler:
        schedule["warmup"] = warmup = values.warmup * global_batch
        if values.lr_scheduler != "const":
            # A warm-up that is longer than training is OpenLM's too: the rate is still rising at the end.
            horizon = max(values.epochs * epoch, warmup)
            schedule |= {"schedule": "cosine", "lr_min": values.lr_cooldown_end, "horizon": horizon}
        if values.lr_scheduler == "const-cooldown":
            if values.epochs_cooldown is None:
                raise ConfigError("--lr-scheduler const-cooldown needs --epochs-cooldown")
            decay = {"decay": values.epochs_cooldown * epoch, "decay_power": values.lr_cooldown_power}
            schedule |= {"schedule": "wsd", **decay}
        schedule["lr_floor"] = values.force_min_lr
    if values.epochs_cooldown is not None and values.lr_scheduler != "const-cooldown":
        raise ConfigError("--epochs-cooldown has an effect with --lr-scheduler const-cooldown only")
    if values.precision in ("bf16", "fp16"):
        raise ConfigError(
            f"--precision {values.precision} computes in fp32 in OpenLM, whatever it says: give fp32 for the same, or "
            "amp_bfloat16 for bfloat16"
        )
    averages = [] if values.averagers in (None, "none") else values.averagers.split(",")
    return {
        **schedule,
        "global_batch": global_batch,
        "lr": values.lr,
        "beta1": values.beta1,
        "beta2": values.beta2,
        "eps": values.eps,
        "weight_decay": values.wd,
        "grad_clip": values.grad_clip_norm,
        "z_loss": values.z_loss_coefficient,
        "precision": "fp32" if values.precision == "fp32" and not values.fsdp_amp else "bf16",
        "squash_mask_left": values.squash_mask_left,
        "averages": averages,
        # With --global-batch-size the share of a process would tie the order of the data to their number.
        **({"source_batch": values.batch_size} if values.batch_size else {}),
    }


def _sampling(values: argparse.Namespace, sources: list[dict[str, Any]]) -> str:
    manifests = values.dataset_manifest or values.dataset_metadata
    if values.disable_buffer and not manifests:
        raise ConfigError("--disable-buffer works with --dataset-manifest only; other orders are shuffled")
    if values.dataset_resampled:
        return "resampled"
    if manifests:
        return "manifest"
    remote = any("://" in s["shards"] and not s["shards"].startswith(SCHEME) for s in sources)
    return "windowed" if remote else "permutation"


def _execution(values: argparse.Namespace, local_batch: int, world_size: int, local_world_size: int) -> dict[str, Any]:
    if not values.fsdp and (values.fsdp_amp or values.fsdp_hybrid or values.fsdp_hybrid_o2):
        raise ConfigError("--fsdp-amp, --fsdp-hybrid and --fsdp-hybrid-o2 need --fsdp")
    if values.resume not in (None, "latest"):
        raise ConfigError(
            f"--resume {values.resume}: a run resumes from the newest checkpoint in its own folder (--resume latest). "
            "To begin with the weights of another, use --pretrained"
        )
    if ".." in Path(values.name or "").parts:
        raise ConfigError(f"--name {values.name} is outside of --logs")
    if values.workers < 0:
        raise ConfigError(f"--workers {values.workers}: say 0 or more")
    if "://" in values.logs:
        raise ConfigError("--logs is a local folder; --remote-sync copies checkpoints to a store")
    replicas = 1 if values.fsdp else world_size
    if values.fsdp_hybrid or values.fsdp_hybrid_o2:
        replicas = world_size // local_world_size
    reporters = [r for r in ("wandb", "tensorboard") if r in values.report_to or "all" in values.report_to]
    if values.report_to and not reporters:
        raise ConfigError(f"--report-to {values.report_to}: say wandb, tensorboard or all")
    return {
        "micro_batch": local_batch // values.accum_freq,
        "activation_checkpointing": "full" if values.grad_checkpointing else "none",
        "compile": values.torchcompile,
        "replicas": replicas,
        "reshard_after_forward": not values.fsdp_hybrid_o2,
        "prefetch_batches": 2 * max(1, values.workers),
        "log_every": values.log_every_n_steps,
        "report_to": reporters,
        "wandb_project": values.wandb_project_name,
        "upload_to": values.remote_sync,
    }


def _sources(values: argparse.Namespace, home: Home, settings: tuple[int | None, ...]) -> list[dict[str, Any]]:
    manifests = values.dataset_manifest or values.dataset_metadata
    if values.dataset_type == "synthetic":
        if values.train_num_samples is None:
            raise ConfigError("--dataset-type synthetic needs --train-num-samples")
        samples = max(1, values.train_num_samples // settings[0])
        return [{"name": "synthetic", "shards": f"{SCHEME}{samples}/{values.seed}"}]
    if bool(manifests) == bool(values.train_data):
        raise ConfigError(
            "say what to train on: --train-data or --dataset-manifest, one of the two. To score a checkpoint without "
            "training there is `openlm evaluate`"
        )
    weights = values.train_data_mix_weights
    patterns = manifests or values.train_data
    if weights is None and not manifests:
        patterns = _joined(patterns)
    if weights is not None and len(weights) != len(patterns):
        raise ConfigError(f"{len(weights)} --train-data-mix-weights for {len(patterns)} sources")
    if not manifests:
        for pattern in patterns:
            _check_key(pattern, values.data_key, "--data-key", home)
    named = [_source(pattern, settings) for pattern in patterns]
    return [{**s, "weight": w} for s, w in zip(named, weights)] if weights else named


def _held_out(values: argparse.Namespace, home: Home, settings: tuple[int | None, ...]) -> list[dict[str, Any]]:
    keys = values.val_data_key or [values.data_key]
    patterns = values.val_data or []
    if len(keys) == 1 and len({Path(p).parent for p in patterns}) == 1:
        patterns = _joined(patterns)
    if len(keys) not in (1, len(patterns)):
        raise ConfigError(f"{len(keys)} --val-data-key for {len(patterns)} sources of --val-data")
    for pattern, key in zip(patterns, keys if len(keys) > 1 else keys * len(patterns)):
        _check_key(pattern, key, "--val-data-key", home)
    sources = [_source(pattern, settings) for pattern in patterns]
    return [{**source, "name": f"validation_{source['name']}"} for source in sources]


def _joined(patterns: list[str]) -> list[str]:
    """Tars given one by one are one source: a shell makes many arguments of `shard-{0..9}.tar`."""
    if len(patterns) > 1 and all(p.endswith(".tar") and "{" not in p and "::" not in p for p in patterns):
        return ["::".join(patterns)]
    return patterns


def _absolute(pattern: str) -> str:
    return "::".join(p if "://" in p or p.startswith(PIPE) else str(Path(p).absolute()) for p in pattern.split("::"))


def _source(pattern: str, settings: tuple[int | None, ...]) -> dict[str, Any]:
    """A source whose name tells its data and settings from all others, as it names the folder of converted shards."""
    shards = _shards(pattern)
    digest = hashlib.sha256(repr((shards, settings)).encode()).hexdigest()[:8]
    last = re.sub(r"\.(tar|jsonl)$", "", shards.split("::")[0]).rstrip("/").rpartition("/")[2]
    return {"name": f"{_slug(last)[:40]}_{digest}", "shards": shards}


def _shards(pattern: str) -> str:
    """The folder that `pattern` names where it is a dataset of ours, the manifest where it is OpenLM's."""
    shards = _absolute(pattern)
    if is_list(shards) and not shards.endswith(".jsonl"):
        return shards
    folder = shards.rpartition("/")[0] if shards.endswith(".jsonl") else shards.rstrip("/")
    if (Path(folder) / DATASET).exists():
        return folder
    return shards if shards.endswith(".jsonl") else join(folder, MANIFEST)


def _check_key(pattern: str, key: str, flag: str, home: Home) -> None:
    """
    Raises:
        ConfigError: the members of a source have another extension.
    """
    if not is_list(pattern) or pattern.endswith(".jsonl"):
        return
    member = first_member(expand(_absolute(pattern), home)[0])
    found = member.rpartition("/")[2].partition(".")[2].lower()
    if found != key:
        raise ConfigError(f"{flag} is {key}, but the samples of {pattern} are named like {member}: give {flag} {found}")


def _weights(values: argparse.Namespace) -> dict[Path, float]:
    if values.average and values.pretrained:
        raise ConfigError("--pretrained and --average both say which weights to begin with; give one of them")
    if values.average_coefficients and len(values.average_coefficients) != len(values.average or ()):
        raise ConfigError("--average-coefficients are as many as the checkpoints of --average")
    paths = [values.pretrained] if values.pretrained else values.average or []
    coefficients = values.average_coefficients or [1 / len(paths) for _ in paths]
    return {Path(p).absolute(): c for p, c in zip(paths, coefficients)}


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", text.lower()).strip("_") or "openlm"


def _date_name(values: argparse.Namespace, local_batch: int, environment: Mapping[str, str] = os.environ) -> str:
    """OpenLM's name of a run that was given none, the same in all processes that one torchrun started."""
    if int(environment.get("GROUP_WORLD_SIZE", 1)) > 1:
        raise ConfigError("a run on several machines needs --name")
    starter = psutil.Process(os.getppid() if "RANK" in environment else os.getpid())
    date = time.strftime("%Y_%m_%d-%H_%M_%S", time.localtime(starter.create_time()))
    model = Path(values.model).stem
    return f"{date}-model_{model}-lr_{values.lr}-b_{local_batch}"
