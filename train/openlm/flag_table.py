"""OpenLM's command-line flags: type, default, and what each does here.

`live` flags have their effect. `always` flags ask for what is so in any case, and are accepted. `refused` flags end the
program, with the reason and what to use instead, unless they have their default value. Defaults are those of
mlfoundations/open_lm's `params.py`; `batch-size` and `dataset-metadata` are its flags of August 2023.
"""

from dataclasses import dataclass
from typing import Any, Literal

from openlm_pipeline.models.config import NORMS
from openlm_pipeline.units import parse_tokens


@dataclass(frozen=True)
class Flag:
    """One flag, named without its dashes."""

    name: str
    kind: Literal["live", "always", "refused"]
    note: str
    """What a flag does; why a flag is refused, and what to use instead."""
    type: Any = bool
    """`bool` takes no value."""
    default: Any = False
    many: bool = False
    choices: tuple[str, ...] | None = None

    @property
    def key(self) -> str:
        return self.name.replace("-", "_")


def _live(name: str, type: Any, default: Any, note: str, **more: Any) -> Flag:
    return Flag(name, "live", note, type, default, **more)


def _always(name: str, note: str, type: Any = bool, default: Any = False, **more: Any) -> Flag:
    return Flag(name, "always", note, type, default, **more)


def _refused(name: str, note: str, type: Any = bool, default: Any = False, **more: Any) -> Flag:
    return Flag(name, "refused", note, type, default, **more)


_NEVER_SHORT = "epochs never come short here, so there is nothing to tolerate; leave it out"
_NO_MOE = "there are no mixture-of-experts models here; use a dense --ffn-type"
_NO_HF = "it does not work in OpenLM either; give an OpenLM --model, and --pretrained for its weights"
_NO_CUSTOM_ATTENTION = "attention is softmax attention: use --attn-name auto"
_NO_DISTILLATION = "OpenLM ignores it, and there is no distillation here; leave it out"
_FSDP2 = "so it is, with the FSDP of today's PyTorch"

DATA = (
    _live("train-data", str, None, "sources: tars with {0000..0099}, `::` between them, or a folder", many=True),
    _live("train-data-mix-weights", float, None, "share of each source of --train-data", many=True),
    _refused(
        "train-data-upsampling-factors",
        "OpenLM only compares its length; use --train-data-mix-weights",
        str,
        None,
        many=True,
    ),
    _live("dataset-manifest", str, None, "manifest.jsonl of each source; its shards are shuffled", many=True),
    _live("dataset-metadata", str, None, "the same, by its name of 2023", many=True),
    _live(
        "dataset-type", str, "auto", "`synthetic`: random tokens, no data", choices=("auto", "webdataset", "synthetic")
    ),
    _live("dataset-resampled", bool, False, "draw shards with replacement"),
    _live("data-key", str, "txt", "extension of the tars' members", choices=("txt", "json", "json.gz", "npy")),
    _live("train-num-samples", parse_tokens, None, "tokens per epoch; by default all there are"),
    _live("val-data", str, None, "sources to validate on, as --train-data; tars of one folder are one", many=True),
    _live("val-data-key", str, None, "extension of their members, one or one each; by default --data-key", many=True),
    _live("val-num-samples", parse_tokens, None, "tokens to validate on; by default all"),
    _live("workers", int, 1, "batches read ahead: two per worker"),
    _live("disable-buffer", bool, False, "no shuffling beyond shards; for --dataset-manifest, where it is so"),
    _always("multiple-data-passes", "data that is used up begins again"),
    _refused("ignore-parse-errors", "no sample is ever left out; repair the shard that the error names"),
    _refused("data-tolerate-error-p", _NEVER_SHORT, float, 0.09),
    _refused("data-tolerate-num-ckpts", _NEVER_SHORT, int, 0),
)

MODEL = (
    _live("model", str, "open_lm_1b", "name, or path of a JSON config, whose own settings win over these flags"),
    _live("model-norm", str, "default_layer_norm", "normalisation", choices=NORMS),
    _live("qk-norm", bool, False, "normalise queries and keys"),
    _live("ffn-type", str, "swiglu", "feed-forward network: swiglu, swiglu_torch, gelu"),
    _live("positional-embedding-type", str, "rotary", "rotary, llama_rotary, head_rotary, none"),
    _always(
        "attn-name",
        "attention that computes the same: the fastest that torch has",
        str,
        "auto",
        choices=("auto", "xformers_attn", "xformers_attn_variable_length", "torch_attn"),
    ),
    _refused("attn-activation", _NO_CUSTOM_ATTENTION, str, None),
    _refused("attn-seq-scalar", _NO_CUSTOM_ATTENTION, str, None),
    _refused("attn-seq-scalar-alpha", _NO_CUSTOM_ATTENTION, float, None),
    _refused("moe-freq", _NO_MOE, int, 0),
    _refused("moe-num-experts", _NO_MOE, int, None),
    _refused("moe-weight-parallelism", _NO_MOE),
    _refused("moe-expert-model-parallelism", _NO_MOE),
    _refused("moe-capacity-factor", _NO_MOE, float, 1.25),
    _refused("moe-loss-weight", _NO_MOE, float, 0.1),
    _refused("moe-top-k", _NO_MOE, int, 2),
    _refused("hf-model", _NO_HF, str, None),
    _refused("hf-seq-len", _NO_HF, int, None),
    _refused("hf-fsdp-block", _NO_HF, str, None),
    _refused("use-bn-sync", "OpenLM ignores it, and the models have no batch norm; leave it out"),
    _refused("use-bnb-linear", "OpenLM ignores it; for less memory use --fsdp and --grad-checkpointing", str, None),
    _refused("distill-model", _NO_DISTILLATION, str, None),
    _refused("distill-pretrained", _NO_DISTILLATION, str, None),
)

OPTIMISATION = (
    _live("global-batch-size", int, None, "sequences per step over all processes; 64 if no batch flag is given"),
    _live("batch-size", int, None, "sequences per step of each process"),
    _live("accum-freq", int, 1, "parts in which a process takes its sequences of a step, one after the other"),
    _live("epochs", int, 32, "epochs of --train-num-samples tokens"),
    _live("lr", float, 5e-4, "learning rate"),
    _live("lr-scheduler", str, "cosine", "schedule", choices=("cosine", "const", "const-cooldown")),
    _live("warmup", int, 10_000, "steps of linear warm-up"),
    _live("epochs-cooldown", int, None, "epochs of the cooldown of const-cooldown"),
    _live("lr-cooldown-end", float, 0.0, "learning rate at the end of cosine and of the cooldown"),
    _live("lr-cooldown-power", float, 1.0, "power of the cooldown"),
    _live("force-min-lr", float, 0.0, "least learning rate after the warm-up"),
    _live("skip-scheduler", bool, False, "the same learning rate at every step"),
    _refused("optimizer", "OpenLM takes AdamW whatever it says; use adamw", str, "adamw"),
    _live("beta1", float, 0.9, "of AdamW"),
    _live("beta2", float, 0.95, "of AdamW (0.999 in August 2023)"),
    _live("eps", float, 1e-8, "of AdamW"),
    _live("wd", float, 0.2, "weight decay, of all parameters"),
    _live("grad-clip-norm", float, None, "largest norm of the gradient"),
    _live("z-loss-coefficient", float, 0.0, "of the mean squared log-partition"),
    _live("target-mask-left", int, None, "token id: targets up to its last place count for nothing"),
    _live("target-mask-individual", int, None, "token id that is never a target, such as padding"),
    _live("squash-mask-left", bool, False, "also take the --target-mask-left tokens out"),
    _live("averagers", str, None, "averages of the weights to keep: poly_8_1,ema_0.9999_10"),
    _live("seed", int, 0, "of the initial weights and the order of the data"),
    _live("pretrained", str, None, "checkpoint whose weights to begin with"),
    _live("average", str, None, "checkpoints to begin with the weighted sum of", many=True),
    _live("average-coefficients", float, None, "their weights; by default equal, with sum 1", many=True),
    _refused("load-pretrained-state", "--pretrained takes the weights alone; a run resumes with --resume latest"),
    _refused(
        "log-avg-model-training-loss",
        "averages are saved with each checkpoint, not measured in training; leave it out",
        float,
        0,
    ),
)

MACHINES = (
    _live(
        "precision",
        str,
        "amp",
        "fp32; amp, amp_bf16 and amp_bfloat16 are bfloat16 with fp32 weights",
        choices=("amp", "amp_bf16", "amp_bfloat16", "bf16", "fp16", "fp32"),
    ),
    _live("fsdp", bool, False, "shard the weights over all processes; without it each has all of them"),
    _live("fsdp-amp", bool, False, "bfloat16 with fp32 gradients and weights"),
    _live("fsdp-hybrid", bool, False, "shard within each machine only"),
    _live("fsdp-hybrid-o2", bool, False, "the same, and keep gathered weights until the backward pass"),
    _always("fsdp-limit-all-gathers", _FSDP2),
    _always("fsdp-use-orig-params", _FSDP2),
    _always("fsdp-backward-prefetch", _FSDP2),
    _refused("fsdp-cpu-offload", "there is no offloading; use --grad-checkpointing, or more processes"),
    _refused("fsdp-pure-bf16", "gradients are summed in fp32, which costs little; use --fsdp-amp"),
    _refused("fsdp-checkpoint", "OpenLM ignores it; use --grad-checkpointing"),
    _live("grad-checkpointing", bool, False, "make each block's activations again in the backward pass"),
    _live("torchcompile", bool, False, "compile each block"),
    _always("experimental-meta-device", "models are always made without memory and then filled"),
    _always("force-distributed", "one process is a process group too"),
    _refused("preset-world-size", "the number of processes is torchrun's --nproc-per-node and --nnodes", int, None),
    _always("dist-backend", "nccl on GPUs, gloo on CPUs", str, "nccl", choices=("nccl", "gloo")),
    _always("dist-url", "torchrun's environment", str, "env://", choices=("env://",)),
    _refused("no-set-device-rank", "each process takes the GPU of its local rank; choose with CUDA_VISIBLE_DEVICES"),
    _refused("ddp-static-graph", "there is no DDP here; leave it out"),
    _refused("torchscript", "OpenLM ignores it; use --torchcompile"),
    _refused("trace", "OpenLM ignores it; use --torchcompile"),
)

RECORDS = (
    _live("name", str, None, "of the run's folder; by default date, model, learning rate and batch"),
    _live("logs", str, "./logs/", "folder of the run's folder"),
    _refused("log-local", "the first process alone writes a log, out.log; leave it out"),
    _live("log-every-n-steps", int, 100, "steps between two records"),
    _refused("log-logit-mean", "it is not measured; metrics.jsonl has loss, gradient norm and speed"),
    _live("save-frequency", int, 1, "epochs between checkpoints"),
    _refused("save-most-recent", "OpenLM never writes that file; --resume latest finds the newest checkpoint"),
    _live("delete-previous-checkpoint", bool, False, "keep the newest checkpoint and the final one only"),
    _live("resume", str, None, "`latest`, which is so in any case: a run resumes from its newest checkpoint"),
    _live("val-frequency", int, 1, "epochs between validations"),
    _live("val-seq-ci", bool, False, "95% bootstrap interval of the validation loss, over sequences"),
    _refused("val-tok-ci", "the tokens of a sequence are not independent; use --val-seq-ci"),
    _refused("val-max-pop-ci", "all validated sequences are resampled; use --val-seq-ci alone", int, None),
    _refused("val-iter-ci", "the number of resamplings is fixed; use --val-seq-ci alone", int, 10_000),
    _always("global-val-batch-size", "the loss does not depend on it: batches are as large as in training", int, None),
    _live("report-to", str, "", "wandb, tensorboard, or all"),
    _live("wandb-project-name", str, "open-lm", "project in wandb"),
    _live("wandb-notes", str, "", "notes of the run in wandb"),
    _live("remote-sync", str, None, "fsspec URL to which each finished checkpoint is copied, s3://bucket/runs"),
    _refused("remote-sync-frequency", "a checkpoint is copied as soon as it is finished; leave it out", int, 300),
    _always("remote-sync-protocol", "the URL of --remote-sync says it", str, "s3", choices=("s3", "fsspec")),
    _refused("debug", "there is one level of logging; leave it out"),
    _refused("copy-codebase", "it copies whatever lies there; use a commit of git, or a container"),
    _live("config", str, None, "YAML or JSON file of flags, in place of all others"),
)

GROUPS = {
    "data": DATA,
    "model": MODEL,
    "optimisation": OPTIMISATION,
    "processes and memory": MACHINES,
    "logs and checkpoints": RECORDS,
}
FLAGS = {flag.key: flag for group in GROUPS.values() for flag in group}
