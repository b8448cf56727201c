"""Released OpenLM and DCLM weights, in the layouts of their files: loaded, scored, and trained on.

Sizes are small and weights random; names of files, keys, settings and where they stand are those of the releases.
"""

import json
import math
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from openlm_reference import State, reference_logits, reference_loss
from safetensors.torch import save_file
from small_run import SameSamples
from tokenizers import Tokenizer, models
from torch import Tensor

from openlm_pipeline.checkpoints import weight_files
from openlm_pipeline.checkpoints.loading import load_checkpoint
from openlm_pipeline.evaluation.scorer import score_questions
from openlm_pipeline.evaluation.subject import open_subject
from openlm_pipeline.evaluation.tasks import Request
from openlm_pipeline.models.config import MODELS, ModelConfig, resolve_model
from openlm_pipeline.runs.folder import RunFolder
from train.distributed import leave_process_group
from train.openlm.run import train_openlm

SMALL = {"hidden_dim": 40, "n_layers": 2, "n_heads": 4, "seq_len": 32, "vocab_size": 260}
AUGUST_2023 = {"positional_embedding": "head_rotary"}
DCLM = {"norm": "gain_only_lp_layer_norm", "qk_norm": True}
DCLM_FLAGS = "--model-norm gain_only_lp_layer_norm --qk-norm"
Write = Callable[[Path, State, ModelConfig, pytest.MonkeyPatch], Path]


def openlm_state(config: ModelConfig) -> State:
    """Random weights under OpenLM's keys, in its order; gains and biases are far from 1 and 0."""
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int, mean: float = 0.0) -> Tensor:
        std = 0.3 if len(shape) == 1 else shape[1] ** -0.5
        return mean + std * torch.randn(shape, generator=generator)

    def norm(name: str) -> State:
        gains = {f"{name}.weight": drawn(config.hidden_dim, mean=1.0)}
        return gains | ({f"{name}.bias": drawn(config.hidden_dim)} if config.norm == "default_layer_norm" else {})

    d, k = config.hidden_dim, config.hidden_dim // config.n_heads
    f = 256 * math.ceil(int(8 * d / 3) / 256)
    state: State = OrderedDict({"tok_embeddings.weight": drawn(config.vocab_size, d)})
    for i in range(config.n_layers):
        layer = f"layers.{i}"
        state[f"{layer}.attention.in_proj.weight"] = drawn(3 * d, d)
        state[f"{layer}.attention.out_proj.weight"] = drawn(d, d)
        state[f"{layer}.attention.pos_embed.inv_freq"] = 1.0 / 10000 ** (torch.arange(0, k, 2).float() / k)
        if config.qk_norm:
            state |= norm(f"{layer}.attention.q_norm") | norm(f"{layer}.attention.k_norm")
        state[f"{layer}.feed_forward.w12.weight"] = drawn(2 * f, d)
        state[f"{layer}.feed_forward.w3.weight"] = drawn(d, f)
        state |= norm(f"{layer}.attention_norm") | norm(f"{layer}.ffn_norm")
    return state | norm("norm") | {"output.weight": drawn(config.vocab_size, d)}


def bare(name: str) -> Write:
    """Weights and nothing else, with nothing beside them; known by its size."""

    def write(root: Path, state: State, config: ModelConfig, patch: pytest.MonkeyPatch) -> Path:
        path = root / name
        torch.save(state, path)
        patch.setitem(weight_files._RELEASED_BYTES, path.stat().st_size, name)
        return path

    return write


def log_folder(prefix: str, flags: dict[str, Any], **more: Any) -> Write:
    """LOGS/NAME with `params.txt` and `checkpoints/epoch_6.pt`."""

    def write(root: Path, state: State, config: ModelConfig, patch: pytest.MonkeyPatch) -> Path:
        path = root / "checkpoints" / "epoch_6.pt"
        path.parent.mkdir()
        keyed = OrderedDict((prefix + key, value) for key, value in state.items())
        torch.save({"epoch": 6, "name": "run", "state_dict": keyed, **more}, path)
        usual = {"lr": 0.003, "workers": 2, "fsdp": True, "vocab_size": config.vocab_size, "resume": None, **flags}
        (root / "params.txt").write_text("".join(f"{key}: {value}\n" for key, value in sorted(usual.items())))
        return path

    return write


def hub_folder(place: str | None, parts: int, **settings: Any) -> Write:
    """`config.json` with the settings at its top or under `place`, and weights in `parts` files, or a `.bin`."""

    def write(root: Path, state: State, config: ModelConfig, patch: pytest.MonkeyPatch) -> Path:
        sizes = {"dim": config.hidden_dim, "n_layers": config.n_layers, "n_heads": config.n_heads}
        sizes |= {"seq_len": config.seq_len, "vocab_size": config.vocab_size}
        common = {"apply_qk_norm": True, "qk_norm": True, "norm_eps": 1e-05, "positional_embedding_type": "rotary"}
        common |= {"attn_name": "auto", "attn_activation": None, "moe_freq": 0, "moe_num_experts": None}
        given = {**common, **sizes, "post_embed_norm": False, "weight_tying": False, **settings}
        document = {"architectures": ["OpenLMModel"], "model_type": "openlm", "params": None, "torch_dtype": "float32"}
        (root / "config.json").write_text(json.dumps({**document, **({place: given} if place else given)}))
        state = {f"model.{key}": value.clone() for key, value in state.items()}
        if not parts:
            torch.save(state, root / "pytorch_model.bin")
            return root
        where = {key: f"model-{1 + i % parts:05d}-of-{parts:05d}.safetensors" for i, key in enumerate(state)}
        for name in set(where.values()):
            save_file({k: v for k, v in state.items() if where[k] == name}, root / name, metadata={"format": "pt"})
        (root / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
        return root

    return write


@dataclass(frozen=True)
class Release:
    model: str
    """OpenLM's name, for a recipe and for `--model`."""
    write: Write
    variant: dict[str, Any] = field(default_factory=dict)
    """What a recipe says beside the name."""
    flags: str = ""
    """What OpenLM's command line says beside `--model`."""


HEAD = {"model_norm": "default_layer_norm", "qk_norm": False, "ffn_type": "swiglu", "moe_freq": 0}
HEAD |= {"positional_embedding_type": "rotary", "attn_name": "auto"}
SAVED = {"step": 9538, "shard_shuffle_seed": 124, "next_shard_per_source": [3], "samples_seen": 64}
METRICS = {"evaluation_metrics": [{"loss": np.float64(2.5), "train_tokens": 7}]}
OLD_FLAGS = "--positional-embedding-type head_rotary"
DCLM_RUN = {**HEAD, "model_norm": "gain_only_lp_layer_norm", "qk_norm": True}
RELEASES = {
    "mlfoundations/open_lm_1B": Release("open_lm_1b", bare("open_lm_1b.pt"), AUGUST_2023, OLD_FLAGS),
    "mlfoundations/open_lm_7B_1.25T": Release("open_lm_7b", bare("open_lm_7b_1p25T.pt"), AUGUST_2023, OLD_FLAGS),
    "August 2023": Release(
        "m1b_neox",
        log_folder(
            "module.", {"model": "m1b_neox", "model_norm": "default_layer_norm", "qk_norm": False}, evaluation_loss=-1
        ),
        AUGUST_2023,
        OLD_FLAGS,
    ),
    "open_lm_1b_old": Release("open_lm_1b_old", log_folder("", {**HEAD, "model": "open_lm_1b_old"}, **SAVED)),
    "today": Release("m1b_neox", log_folder("_orig_mod.", {**HEAD, "model": "m1b_neox"}, **SAVED, **METRICS)),
    "DCLM 412M": Release(
        "d=1024_l=24_h=8",
        log_folder("", {**DCLM_RUN, "model": "training/open_lm_configs/d=1024_l=24_h=8.json"}, **SAVED, **METRICS),
        DCLM,
        DCLM_FLAGS,
    ),
    "DCLM 1B": Release(
        "open_lm_1b_swiglutorch", log_folder("", {**DCLM_RUN, "model": "open_lm_1b_swiglutorch"}), DCLM, DCLM_FLAGS
    ),
    "DCLM 7B": Release(
        "open_lm_7b_swiglutorch", log_folder("", {**DCLM_RUN, "model": "open_lm_7b_swiglutorch"}), DCLM, DCLM_FLAGS
    ),
    "TRI-ML/DCLM-1B": Release(
        "open_lm_1b_swiglutorch",
        hub_folder(
            None, 2, model="open_lm_1b_swiglutorch", norm_type="gain_only_lp_layer_norm", ffn_type="swiglu_torch"
        ),
        DCLM,
        DCLM_FLAGS,
    ),
    "TRI-ML/DCLM-1B-v0": Release(
        "open_lm_1b_swiglutorch",
        hub_folder(
            "params_args_dict",
            2,
            model="open_lm_1b_swiglutorch",
            model_norm="gain_only_lp_layer_norm",
            ffn_type="swiglu_torch",
        ),
        DCLM,
        DCLM_FLAGS,
    ),
    "apple/DCLM-7B": Release(
        "open_lm_7b",
        hub_folder(
            None, 3, model="open_lm_7b", norm_type="gain_only_lp_layer_norm", ffn_type="swiglu", attn_name="torch_attn"
        ),
        DCLM,
        DCLM_FLAGS,
    ),
    "mlfoundations/dclm-7b-it": Release(
        "open_lm_7b",
        hub_folder("params", 3, model="open_lm_7b", model_norm="gain_only_lp_layer_norm", ffn_type="swiglu"),
        DCLM,
        DCLM_FLAGS,
    ),
    "pytorch_model.bin": Release(
        "open_lm_1b",
        hub_folder("params_args_dict", 0, model="open_lm_1b", model_norm="gain_only_lp_layer_norm", ffn_type="swiglu"),
        DCLM,
        DCLM_FLAGS,
    ),
}


@pytest.fixture
def small_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """All of OpenLM's names are of small models."""
    for name, config in MODELS.items():
        monkeypatch.setitem(MODELS, name, config.model_copy(update=SMALL))


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> SameSamples:
    return SameSamples(tmp_path_factory.mktemp("released"), "{name: open_lm_1b}")


def silent(note: str) -> None:
    raise AssertionError(f"a release leaves nothing to assume: {note}")


@pytest.mark.usefixtures("small_names")
@pytest.mark.parametrize("name", RELEASES)
def test_a_release_is_loaded_scored_and_trained_on(
    tmp_path: Path, small: SameSamples, monkeypatch: pytest.MonkeyPatch, name: str
):
    release = RELEASES[name]
    config = resolve_model({"name": release.model, **release.variant})
    state = openlm_state(config)
    path = release.write(tmp_path, state, config, monkeypatch)
    row = small.sample

    loaded = load_checkpoint(path, warn=silent)
    assert loaded.config.model_copy(update={"seq_len": 32}) == config  # which a bare file does not tell
    expected = reference_logits(state, config, row[None, :-1])
    torch.testing.assert_close(loaded(row[None, :-1]).double(), expected, rtol=0, atol=2e-5)
    assert load_checkpoint(path, config=release.model, warn=silent).config == config

    tokenizer = tmp_path / "tokenizer.json"
    Tokenizer(models.WordLevel({"<|endoftext|>": 0, "a": 1}, unk_token="<|endoftext|>")).save(str(tokenizer))
    subject = open_subject(str(path), tokenizer=str(tokenizer), report=silent)
    ids = row.tolist()
    ((score,),) = score_questions(subject.model, [[Request(tuple(ids[:20]), tuple(ids[20:-1]))]])
    logprobs = expected[0].log_softmax(-1)
    assert score.sum_logprob == pytest.approx(sum(logprobs[i - 1, ids[i]].item() for i in range(20, 32)), abs=1e-3)

    loss = reference_loss(state, config, row[None, :-1], row[None, 1:]).item()
    label = "".join(c if c.isalnum() else "_" for c in name.lower())
    variant = [f"model.{key}={value}" for key, value in release.variant.items()]
    begun = small.first_loss(label, f"model.name={release.model}", *variant, f"init_from={path}")
    assert begun == pytest.approx(loss, abs=1e-4)

    monkeypatch.setenv("OPENLM_HOME", str(small.home.root))
    line = (
        f"--model {release.model} {release.flags} --dataset-manifest {small.home.shards('same', 'v1')}/manifest.jsonl"
    )
    line += f" --train-num-samples 64 --epochs 1 --batch-size 2 --warmup 1 --precision fp32 --pretrained {path}"
    try:
        train_openlm([*line.split(), "--logs", str(tmp_path / "logs"), "--name", "run", "--log-every-n-steps", "1"])
    finally:
        leave_process_group()
    records = RunFolder(tmp_path / "logs" / "run").read_metrics()
    assert next(r["loss"] for r in records if "loss" in r) == pytest.approx(loss, abs=1e-4)


@pytest.mark.usefixtures("small_names")
def test_scores_of_other_weights_are_filed_apart_in_every_layout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    tokenizer = tmp_path / "tokenizer.json"
    Tokenizer(models.WordLevel({"<|endoftext|>": 0}, unk_token="<|endoftext|>")).save(str(tokenizer))
    config = resolve_model({"name": "open_lm_1b", **DCLM})
    state = openlm_state(config)
    digests = set()
    for name in ("TRI-ML/DCLM-1B", "pytorch_model.bin"):
        for changed in (state, {**state, "norm.weight": 2 * state["norm.weight"]}):
            folder = tmp_path / str(len(digests))
            folder.mkdir()
            RELEASES[name].write(folder, changed, config, monkeypatch)
            digests.add(open_subject(str(folder), tokenizer=str(tokenizer)).digest)
    assert len(digests) == 4
