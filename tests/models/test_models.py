"""Models by name, alias and OpenLM config file: the right shapes, state_dict and errors."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from openlm_pipeline.errors import ConfigError, DataError, MissingInputError
from openlm_pipeline.models import ModelConfig, count_parameters, create_model, find_config
from openlm_pipeline.models.config import ALIASES, NORMS

PARAMETERS = {  # OpenLM's: LayerNorm with bias, gain-only, gain-only with qk-norm
    "open_lm_11m": (11_014_848, 11_012_448, 11_014_752),
    "open_lm_25m": (24_683_904, 24_679_104, 24_683_712),
    "open_lm_87m": (87_474_000, 87_461_800, 87_473_320),
    "open_lm_160m": (162_436_608, 162_417_408, 162_435_840),
    "open_lm_411m": (411_666_432, 411_616_256, 411_665_408),
    "open_lm_830m": (834_554_880, 834_479_616, 834_553_344),
    "open_lm_1b": (1_439_895_552, 1_439_795_200, 1_439_893_504),
    "open_lm_3b": (2_796_098_560, 2_795_932_160, 2_796_096_000),
    "open_lm_7b": (6_889_676_800, 6_889_410_560, 6_889_672_704),
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_counts_are_openlms(name: str):
    variants = [{}, {"norm": "gain_only_layer_norm"}, {"norm": "gain_only_layer_norm", "qk_norm": True}]
    for expected, variant in zip(PARAMETERS[name], variants, strict=True):
        model = create_model(name, device="meta", **variant)
        assert sum(p.numel() for p in model.parameters()) == expected
        assert count_parameters(model.config) == expected


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("ffn", ["swiglu", "gelu", "gemma_geglu"])
@pytest.mark.parametrize("switch", [True, False])
def test_counting_needs_no_model(norm: str, ffn: str, switch: bool):
    variant = {"norm": norm, "ffn": ffn, "qk_norm": switch, "weight_tying": switch, "post_embed_norm": switch}
    model = create_model("open_lm_87m", device="meta", **variant)
    assert count_parameters(model.config) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("alias", ALIASES)
def test_every_alias_makes_the_model_it_stands_for(alias: str):
    assert create_model(alias, device="meta").config == find_config(ALIASES[alias])


def layer_keys(layer: int) -> dict[str, tuple[int, ...]]:
    return {
        f"layers.{layer}.attention.in_proj.weight": (1440, 488),
        f"layers.{layer}.attention.out_proj.weight": (488, 480),
        f"layers.{layer}.attention.pos_embed.inv_freq": (20,),
        f"layers.{layer}.feed_forward.w12.weight": (3072, 488),
        f"layers.{layer}.feed_forward.w3.weight": (488, 1536),
        f"layers.{layer}.attention_norm.weight": (488,),
        f"layers.{layer}.attention_norm.bias": (488,),
        f"layers.{layer}.ffn_norm.weight": (488,),
        f"layers.{layer}.ffn_norm.bias": (488,),
    }


ROOT_KEYS = {
    "tok_embeddings.weight": (50432, 488),
    "norm.weight": (488,),
    "norm.bias": (488,),
    "output.weight": (50432, 488),
}


def shapes(**variant) -> dict[str, tuple[int, ...]]:
    model = create_model("open_lm_87m", device="meta", n_layers=2, **variant)
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


def test_state_dict_has_openlms_names_and_shapes():
    default = {**ROOT_KEYS, **layer_keys(0), **layer_keys(1)}
    assert shapes() == shapes(positional_embedding="head_rotary") == shapes(norm="lp_layer_norm") == default
    assert shapes(weight_tying=True) == default

    without_buffers = {k: v for k, v in default.items() if not k.endswith("inv_freq")}
    assert shapes(positional_embedding="llama_rotary") == shapes(positional_embedding="none") == without_buffers

    gain_only = {k: v for k, v in default.items() if not k.endswith("bias")}
    assert shapes(norm="rms_norm") == shapes(norm="gain_only_lp_layer_norm") == gain_only
    assert shapes(norm="no_wb_layer_norm") == {k: v for k, v in gain_only.items() if "norm" not in k}

    qk_gains = {f"layers.{i}.attention.{n}_norm.weight": (480,) for i in range(2) for n in "qk"}
    assert shapes(norm="gain_only_layer_norm", qk_norm=True) == gain_only | qk_gains
    post_embed = {"post_embed_norm.weight": (488,), "post_embed_norm.bias": (488,)}
    assert shapes(post_embed_norm=True) == default | post_embed

    gelu = {k: v for k, v in default.items() if "feed_forward" not in k}
    for layer in range(2):
        for key in ("_ff_w1", "feed_forward.0"):
            gelu[f"layers.{layer}.{key}.weight"] = (1952, 488)
        for key in ("_ff_w2", "feed_forward.2"):
            gelu[f"layers.{layer}.{key}.weight"] = (488, 1952)
    assert shapes(ffn="gelu") == gelu


def test_tied_weights_are_one_tensor_with_storage_too():
    model = create_model("open_lm_11m", n_layers=1, vocab_size=100, weight_tying=True)
    assert model.tok_embeddings.weight is model.output.weight
    assert count_parameters(model.config) == sum(p.numel() for p in model.parameters())


def test_openlm_json_config(tmp_path: Path):
    path = tmp_path / "mine.json"
    document = {"hidden_dim": 96, "n_layers": 8, "n_heads": 4, "seq_len": 2048, "vocab_size": 50432}
    document |= {"post_embed_norm": False, "weight_tying": False}
    path.write_text(json.dumps(document))
    plain = ModelConfig(hidden_dim=96, n_layers=8, n_heads=4)
    assert find_config(path) == plain
    assert create_model(str(path), device="meta", qk_norm=True).config == plain.model_copy(update={"qk_norm": True})

    flags = {"model_norm": "gain_only_lp_layer_norm", "qk_norm": True, "positional_embedding_type": "head_rotary"}
    path.write_text(json.dumps(document | flags | {"ffn_type": "gelu"}))
    config = find_config(path)
    assert (config.norm, config.qk_norm) == ("gain_only_lp_layer_norm", True)
    assert (config.positional_embedding, config.ffn) == ("head_rotary", "gelu")


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("[1]", DataError, "holds a list"),
        ("{", DataError, "not valid JSON"),
        ('{"hidden_dim": 96, "n_layers": 2, "n_heads": 4, "vocabsize": 9}', ConfigError, "did you mean 'vocab_size'"),
        ('{"hidden_dim": 96, "n_layers": 2, "n_heads": 4, "ffn_type": "moe"}', ConfigError, "experts"),
        ('{"hidden_dim": 96, "n_layers": 2, "n_heads": 4, "ffn_type": "gelu", "ffn": "gelu"}', ConfigError, "two"),
        ('{"hidden_dim": 96, "n_layers": 0, "n_heads": 4}', ConfigError, "n_layers"),
    ],
)
def test_a_bad_json_config_is_named(tmp_path: Path, text: str, error: type, message: str):
    path = tmp_path / "mine.json"
    path.write_text(text)
    with pytest.raises(error, match=message) as caught:
        create_model(str(path))
    assert "mine.json" in str(caught.value)


def test_openlms_later_models_are_here():
    assert (find_config("open_lm_411m_v2").n_heads, find_config("open_lm_154m_v2").n_layers) == (8, 24)
    assert find_config("open_lm_1b_old").positional_embedding == "head_rotary"
    llama = find_config("llama2_7b")
    assert (llama.seq_len, llama.vocab_size, llama.norm) == (4096, 32000, "rms_norm")
    assert count_parameters(llama) == 6_738_415_616  # Llama 2 7B's own count


@pytest.mark.parametrize(("name", "reason"), [("mamba_7b", "state-space"), ("ant_neox_moe", "experts")])
def test_models_that_are_no_dense_transformers_are_refused_with_the_reason(name: str, reason: str):
    with pytest.raises(ConfigError, match=reason):
        create_model(name)


def test_geglu_starts_as_torchs_linear_does():
    model = create_model("open_lm_11m", n_layers=1, vocab_size=100, ffn="gemma_geglu")
    f = model.layers[0].feed_forward
    for linear, fan_in in ((f.gate_proj, 96), (f.up_proj, 96), (f.down_proj, 256)):
        for value in (linear.weight, linear.bias):
            assert value.std().item() == pytest.approx(fan_in**-0.5 / 3**0.5, rel=0.15)
            assert value.abs().max().item() <= fan_in**-0.5


def test_what_does_not_exist_is_refused_with_the_nearest():
    with pytest.raises(ConfigError, match="'open_lm_1bn'; did you mean 'open_lm_1b'"):
        create_model("open_lm_1bn")
    with pytest.raises(ConfigError, match="did you mean 'qk_norm'"):
        create_model("open_lm_11m", qknorm=True)
    with pytest.raises(MissingInputError, match="absent.json"):
        create_model("absent.json")


def test_configs_load_without_torch():
    code = "import sys, openlm_pipeline.models.config, openlm_pipeline.models as m; "
    code += "m.count_parameters(m.find_config('open_lm_7b')); sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


def test_every_public_name_can_be_imported():
    import openlm_pipeline.models as models

    assert all(getattr(models, name) is not None for name in models.__all__)
    assert isinstance(create_model("open_lm_11m", device="meta"), models.Transformer)
    assert isinstance(models.Transformer, type) and issubclass(models.Transformer, torch.nn.Module)
    with pytest.raises(AttributeError, match="no attribute 'transformers'"):
        models.transformers  # noqa: B018
