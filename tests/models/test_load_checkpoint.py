"""`load_checkpoint` reads OpenLM's files of all kinds, finds the variant, and says what it had to assume."""

import json
import os
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from openlm_pipeline.checkpoints import weight_files
from openlm_pipeline.checkpoints.loading import find_model_config, load_checkpoint
from openlm_pipeline.errors import ConfigError, DataError, MissingInputError
from openlm_pipeline.models import create_model
from openlm_pipeline.models.config import ModelConfig
from openlm_pipeline.models.transformer import Transformer

TINY = ModelConfig(hidden_dim=20, n_layers=2, n_heads=3, vocab_size=50)
IDS = torch.arange(24).reshape(2, 12)
VARIANTS: list[dict[str, Any]] = [
    {},
    {"norm": "gain_only_layer_norm", "qk_norm": True},
    {"norm": "rms_norm"},
    {"norm": "no_wb_layer_norm"},
    {"weight_tying": True, "post_embed_norm": True},
    {"ffn": "gelu"},
    {"ffn": "gemma_geglu"},
]
NOT_SHOWN = ("rms_norm",)


def same_model(model: Transformer, expected: Transformer) -> bool:
    with torch.no_grad():
        return not model.training and torch.equal(model(IDS), expected(IDS))


def ignore(note: str) -> None:
    """For tests of something else than what is noted."""


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "model."])
def test_the_variant_is_found_in_keys_and_shapes(tmp_path: Path, variant: dict, prefix: str):
    model = create_model(TINY, **variant)
    state = OrderedDict((prefix + name, value) for name, value in model.state_dict().items())
    torch.save({"epoch": 3, "name": "run", "state_dict": state, "evaluation_loss": -1}, tmp_path / "epoch_3.pt")
    said = {name: value for name, value in variant.items() if value in NOT_SHOWN}
    notes: list[str] = []
    loaded = load_checkpoint(tmp_path / "epoch_3.pt", warn=notes.append, **said)
    assert same_model(loaded, model)
    assert loaded.config == model.config
    assert any("position type" in note for note in notes)


def test_wrapped_bare_safetensors_and_an_averagers_file_are_one_model(tmp_path: Path):
    model = create_model(TINY)
    state = model.state_dict()
    metrics = [{"loss": np.float64(2.5), "tokens": 7}]  # as OpenLM saves them
    torch.save({"epoch": 1, "step": 9, "state_dict": state, "evaluation_metrics": metrics}, tmp_path / "epoch_1.pt")
    torch.save(state, tmp_path / "bare.pt")
    torch.save(state, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    torch.save({"update_counter": 3, "av_model_sd": state, "method": "ema"}, tmp_path / "ema_1.pt")
    save_file({k: v.clone() for k, v in state.items()}, tmp_path / "weights.safetensors")
    for name in ("epoch_1.pt", "bare.pt", "old.pt", "ema_1.pt", "weights.safetensors"):
        assert same_model(load_checkpoint(tmp_path / name, positional_embedding="rotary"), model)


def test_half_precision_weights_become_fp32(tmp_path: Path):
    torch.save({k: v.bfloat16() for k, v in create_model(TINY).state_dict().items()}, tmp_path / "bf16.pt")
    loaded = load_checkpoint(tmp_path / "bf16.pt", warn=ignore)
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}


def test_frequencies_of_the_checkpoint_are_kept(tmp_path: Path):
    model = create_model(TINY)
    state = model.state_dict()
    rounded = {k: v.bfloat16().float() if k.endswith("inv_freq") else v for k, v in state.items()}
    torch.save(rounded, tmp_path / "rounded.pt")
    loaded = load_checkpoint(tmp_path / "rounded.pt", warn=ignore)
    assert loaded.config.rope_freq_dtype == "bfloat16"
    assert same_model(loaded, create_model(TINY, rope_freq_dtype="bfloat16"))

    own = {k: v * 0.5 if k.endswith("inv_freq") else v for k, v in state.items()}
    torch.save(own, tmp_path / "own.pt")
    notes: list[str] = []
    loaded = load_checkpoint(tmp_path / "own.pt", warn=notes.append)
    assert torch.equal(loaded.layers[0].attention.pos_embed.inv_freq, own["layers.0.attention.pos_embed.inv_freq"])
    assert any("kept as they are" in note for note in notes)


def run_folder(tmp_path: Path, model: Transformer, flags: dict[str, Any]) -> Path:
    path = tmp_path / "checkpoints" / "epoch_1.pt"
    path.parent.mkdir()
    torch.save({"epoch": 1, "state_dict": model.state_dict()}, path)
    (tmp_path / "params.txt").write_text("".join(f"{k}: {v}\n" for k, v in sorted(flags.items())))
    return path


@pytest.mark.parametrize(
    ("flags", "position"),
    [
        ({"positional_embedding_type": "rotary"}, "rotary"),
        ({"positional_embedding_type": "head_rotary"}, "head_rotary"),
        ({"rotary_old": False}, "rotary"),
        ({"rotary_old": True}, "head_rotary"),
        ({}, "head_rotary"),  # August 2023: no such flag
    ],
)
def test_params_txt_of_the_run_tells_what_weights_do_not(tmp_path: Path, flags: dict, position: str):
    model = create_model("open_lm_test_tiny", norm="rms_norm", positional_embedding=position)
    flags = {"model": "open_lm_test_tiny", "model_norm": "rms_norm", "qk_norm": False, "lr": 0.001, **flags}
    path = run_folder(tmp_path, model, flags)
    notes: list[str] = []
    assert load_checkpoint(path, warn=notes.append).config == model.config
    assert notes == []
    found = find_model_config(path)
    assert (found.layout, found.source) == ("OpenLM checkpoint", str(tmp_path / "params.txt"))


def test_an_argument_that_contradicts_what_no_shape_shows_is_noted(tmp_path: Path):
    model = create_model("open_lm_test_tiny", norm="rms_norm")
    path = run_folder(tmp_path, model, {"model": "open_lm_test_tiny", "model_norm": "rms_norm", "rotary_old": True})
    notes: list[str] = []
    same = {"norm": "rms_norm", "positional_embedding": "head_rotary"}
    load_checkpoint(path, config=model.config.model_copy(update=same), warn=notes.append)
    assert notes == []
    asked = {"norm": "gain_only_layer_norm", "positional_embedding": "rotary", "n_heads": 2}
    assert load_checkpoint(path, warn=notes.append, **asked).config.norm == "gain_only_layer_norm"
    said = f"{tmp_path / 'params.txt'} says"
    assert notes == [
        f"{path}: {said} norm rms_norm, and gain_only_layer_norm is taken, as asked",
        f"{path}: {said} positional_embedding head_rotary, and rotary is taken, as asked",
    ]
    flags = {"model": "open_lm_test_tiny", "model_norm": "default_layer_norm", "positional_embedding_type": "rotary"}
    (tmp_path / "same").mkdir()
    path = run_folder(tmp_path / "same", create_model("open_lm_test_tiny"), flags)
    load_checkpoint(path, warn=notes.append, norm="lp_layer_norm")  # the same by another name
    assert len(notes) == 2


def test_the_released_files_are_known_by_their_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "open_lm_1b.pt"
    torch.save(create_model(TINY).state_dict(), path)
    assert find_model_config(path).config.positional_embedding == "rotary"
    monkeypatch.setitem(weight_files._RELEASED_BYTES, path.stat().st_size, "a small stand-in of 5.8 GB")
    found = find_model_config(path)
    assert found.config.positional_embedding == "head_rotary" and "released" in found.source


def test_a_name_leaves_open_what_it_does_not_say(tmp_path: Path):
    model = create_model("open_lm_11m", n_layers=12, norm="gain_only_layer_norm", qk_norm=True, vocab_size=40)
    torch.save(model.state_dict(), tmp_path / "m.pt")
    loaded = load_checkpoint(tmp_path / "m.pt", config="open_lm_11m", warn=ignore)
    assert loaded.config == model.config


@pytest.mark.parametrize("kind", ["llama_rotary", "none"])
def test_without_frequencies_heads_and_positions_must_be_given(tmp_path: Path, kind: str):
    model = create_model(TINY, positional_embedding=kind)
    torch.save(model.state_dict(), tmp_path / "m.pt")
    with pytest.raises(ConfigError, match="n_heads or positional_embedding"):
        load_checkpoint(tmp_path / "m.pt")
    assert same_model(load_checkpoint(tmp_path / "m.pt", n_heads=3, positional_embedding=kind), model)


FLAT = {"model_type": "openlm", "dim": 20, "n_layers": 2, "n_heads": 3, "vocab_size": 50, "seq_len": 2048}
FLAT |= {"norm_type": "gain_only_lp_layer_norm", "apply_qk_norm": True, "positional_embedding_type": "rotary"}
FLAT |= {"ffn_type": "swiglu_torch", "norm_eps": 1e-5, "weight_tying": False, "moe_freq": 0}
NESTED = {"model_type": "openlm", "params": None, "params_args_dict": {k: v for k, v in FLAT.items() if k[:2] != "mo"}}
NESTED["params_args_dict"] |= {"model": "open_lm_7b", "model_norm": "gain_only_lp_layer_norm", "qk_norm": True}


@pytest.mark.parametrize("config", [FLAT, NESTED], ids=["flat", "params_args_dict"])
@pytest.mark.parametrize("weights", ["model.safetensors", "pytorch_model.bin", "shards"])
def test_hugging_face_folders_of_openlm_and_dclm(tmp_path: Path, config: dict, weights: str):
    variant = {"norm": "gain_only_lp_layer_norm", "qk_norm": True, "ffn": "swiglu_torch"}
    model = create_model(TINY, **variant)
    state = {f"model.{name}": value.clone() for name, value in model.state_dict().items()}
    if config is NESTED:
        config = {**config, "params_args_dict": {**config["params_args_dict"], "model": "some_model"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    if weights == "model.safetensors":
        save_file(state, tmp_path / weights)
    elif weights == "pytorch_model.bin":
        torch.save(state, tmp_path / weights)
    else:
        parts = {name: f"part{i % 2}.safetensors" for i, name in enumerate(state)}
        for part in set(parts.values()):
            save_file({k: v for k, v in state.items() if parts[k] == part}, tmp_path / part)
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": parts}))
    notes: list[str] = []
    loaded = load_checkpoint(tmp_path, warn=notes.append)
    assert same_model(loaded, model) and loaded.config == model.config and notes == []


class Runs:
    """Pickles to a call of `os.system`."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def test_a_file_that_would_run_a_command_is_refused(tmp_path: Path):
    proof = tmp_path / "was_run"
    torch.save({"epoch": 1, "state_dict": Runs(f"touch {proof}")}, tmp_path / "epoch_1.pt")
    with pytest.raises(DataError, match="could run code"):
        load_checkpoint(tmp_path / "epoch_1.pt")
    assert not proof.exists()


def test_keys_and_shapes_that_do_not_fit_are_named(tmp_path: Path):
    state = create_model(TINY).state_dict()
    state["layers.1.attention.extra.weight"] = torch.zeros(3)
    del state["layers.1.ffn_norm.bias"]
    state["layers.0.feed_forward.w3.weight"] = torch.zeros(20, 7)
    torch.save(state, tmp_path / "m.pt")
    with pytest.raises(DataError) as caught:
        load_checkpoint(tmp_path / "m.pt", warn=ignore)
    for text in ("missing layers.1.ffn_norm.bias", "unknown layers.1.attention.extra.weight", "[20, 7], not [20, 256]"):
        assert text in str(caught.value)


@pytest.mark.parametrize(
    ("state", "error", "message"),
    [
        ({"backbone.layers.0.mixer.in_proj.weight": torch.zeros(2)}, ConfigError, "state-space"),
        ({"tok_embeddings.weight": torch.zeros(2), "layers.0.feed_forward.experts.mlp.w1": torch.zeros(2)},
         ConfigError, "experts"),
        ({"optimizer": {"state": {}}}, DataError, "where a weight should be"),
        ({"lm_head.weight": torch.zeros(2, 2)}, DataError, "has no tok_embeddings.weight"),
    ],
)  # fmt: skip
def test_what_is_no_openlm_transformer_is_refused(tmp_path: Path, state: dict, error: type, message: str):
    torch.save(state, tmp_path / "m.pt")
    with pytest.raises(error, match=message):
        load_checkpoint(tmp_path / "m.pt")


def test_damaged_and_missing_files(tmp_path: Path):
    (tmp_path / "m.pt").write_bytes(b"not a checkpoint")
    with pytest.raises(DataError, match=r"m\.pt"):
        load_checkpoint(tmp_path / "m.pt")
    with pytest.raises(MissingInputError, match="absent"):
        load_checkpoint(tmp_path / "absent.pt")
    with pytest.raises(MissingInputError, match="no config.json"):
        load_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "mistral"}')
    with pytest.raises(DataError, match="'mistral', not 'openlm', llama or qwen3"):
        load_checkpoint(tmp_path)
