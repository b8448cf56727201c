"""Models of today: grouped queries, norms per head, widths and bases of one's own; against transformers' Qwen3."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from openlm_pipeline.checkpoints.loading import load_checkpoint
from openlm_pipeline.checkpoints.model_export import export_huggingface, export_openlm
from openlm_pipeline.errors import ConfigError
from openlm_pipeline.models import count_parameters, create_model
from openlm_pipeline.models.attention import KVCache
from openlm_pipeline.models.config import ModelConfig, resolve_model
from openlm_pipeline.models.transformer import Transformer
from openlm_pipeline.runs.estimates import block_matrices, matmul_parameters

QWEN3 = ModelConfig(
    hidden_dim=64, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=97, seq_len=64, norm="rms_norm", norm_eps=1e-6,
    qk_norm=True, qk_norm_per_head=True, ffn_hidden_dim=160, rope_theta=5e5, weight_tying=True, init_std=0.02,
)  # fmt: skip
IDS = torch.randint(0, 97, (2, 40), generator=torch.Generator().manual_seed(0))


def as_qwen3(model: Transformer) -> dict[str, Tensor]:
    """The weights under transformers' names."""
    config, state = model.config, model.state_dict()
    kv = config.kv_heads * config.head_dim
    renamed = {"model.embed_tokens.weight": state["tok_embeddings.weight"], "model.norm.weight": state["norm.weight"]}
    for i in range(config.n_layers):
        ours, theirs = f"layers.{i}.", f"model.layers.{i}."
        parts = state[f"{ours}attention.in_proj.weight"].split([config.n_heads * config.head_dim, kv, kv])
        renamed |= {f"{theirs}self_attn.{n}_proj.weight": part for n, part in zip("qkv", parts)}
        gate, up = state[f"{ours}feed_forward.w12.weight"].chunk(2)
        renamed |= {f"{theirs}mlp.gate_proj.weight": gate, f"{theirs}mlp.up_proj.weight": up}
        for name, other in {
            "attention.out_proj": "self_attn.o_proj", "attention.q_norm": "self_attn.q_norm",
            "attention.k_norm": "self_attn.k_norm", "feed_forward.w3": "mlp.down_proj",
            "attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
        }.items():  # fmt: skip
            renamed[f"{theirs}{other}.weight"] = state[f"{ours}{name}.weight"]
    return renamed


@pytest.fixture(scope="module")
def model() -> Transformer:
    made = create_model(QWEN3)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in made.parameters():
            if p.ndim == 1:  # gains of 1 would hide one that is left out
                p.add_(torch.randn(p.shape, generator=generator), alpha=0.3)
    return made


@torch.no_grad()
def test_logits_are_those_of_qwen3(model: Transformer):
    transformers = pytest.importorskip("transformers")
    config = transformers.Qwen3Config(
        vocab_size=97, hidden_size=64, intermediate_size=160, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, rms_norm_eps=1e-6, rope_theta=5e5, tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 5e5},
    )  # fmt: skip
    theirs = transformers.Qwen3ForCausalLM(config).eval()
    missing, unexpected = theirs.load_state_dict(as_qwen3(model), strict=False)
    assert missing == ["lm_head.weight"] and not unexpected
    torch.testing.assert_close(model(IDS), theirs(IDS).logits, rtol=0, atol=1e-5)


@torch.no_grad()
def test_a_group_of_queries_shares_its_keys_and_values(model: Transformer):
    """A model with as many heads of keys, each group's the same, gives the same logits."""
    config = model.config.model_copy(update={"n_kv_heads": None})
    whole, state = create_model(config), model.state_dict()
    for i in range(config.n_layers):
        name = f"layers.{i}.attention.in_proj.weight"
        q, k, v = state[name].split([64, 32, 32])
        k, v = (t.unflatten(0, (2, 16)).repeat_interleave(2, 0).flatten(0, 1) for t in (k, v))
        state[name] = torch.cat([q, k, v])
    whole.load_state_dict(state)
    torch.testing.assert_close(model(IDS), whole(IDS), rtol=0, atol=1e-5)
    documents = (IDS == 5).cumsum(1)
    torch.testing.assert_close(
        model(IDS, documents_BS=documents), whole(IDS, documents_BS=documents), rtol=0, atol=1e-5
    )


@torch.no_grad()
def test_tokens_one_by_one_give_the_logits_of_all_at_once(model: Transformer):
    cache = KVCache(model.config, batch_size=2, max_len=40)
    assert cache.keys.shape[2] == 2
    parts = [model(ids, cache=cache) for ids in IDS.split([7, 1, 1, 31], dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), model(IDS), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "changed", [{}, {"qk_norm_per_head": False}, {"n_kv_heads": 1, "weight_tying": False}, {"ffn": "gelu"}]
)
def test_parameters_are_counted(changed: dict):
    config = QWEN3.model_copy(update=changed)
    made = create_model(config, device="meta")
    assert sum(p.numel() for p in made.parameters()) == count_parameters(config)
    matrices = [tuple(p.shape) for p in made.layers[0].parameters() if p.ndim == 2]
    assert sum(r * c for r, c in block_matrices(config)) == sum(r * c for r, c in matrices)
    assert matmul_parameters(config) == sum(r * c for r, c in matrices) * 2 + 97 * 64


def test_initial_weights_have_the_deviation_asked_for(model: Transformer):
    made = create_model(QWEN3.model_copy(update={"hidden_dim": 256, "n_layers": 1}))
    for name, p in made.named_parameters():
        if p.ndim == 2:
            assert p.std().item() == pytest.approx(0.02 * 0.9866, rel=0.02), name  # of a normal cut at 3 sigma
            assert p.abs().max() <= 0.06


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"n_heads": 4, "n_kv_heads": 3}, "n_heads 4 is no multiple of n_kv_heads 3"),
        ({"n_heads": 4, "qk_norm_per_head": True}, "qk_norm_per_head needs qk_norm"),
        ({"n_heads": 4, "norm_eps": 0}, "norm_eps"),
        ({"n_heads": 4, "n_kv_head": 2}, "did you mean 'n_kv_heads'"),
    ],
)
def test_what_does_not_fit_is_refused(fields: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        resolve_model({"hidden_dim": 64, "n_layers": 2, **fields})


@torch.no_grad()
@pytest.mark.parametrize("changed", [{}, {"qk_norm": False, "qk_norm_per_head": False}, {"weight_tying": False}])
@pytest.mark.parametrize("llama", [True, False], ids=["native", "remote code"])
def test_exports_give_the_same_logits(model: Transformer, changed: dict, llama: bool, tmp_path: Path):
    transformers = pytest.importorskip("transformers")
    made = create_model(model.config.model_copy(update=changed), seed=2)
    export_huggingface(made, tmp_path, llama=llama)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=not llama).eval()
    kind = "OpenLM" if not llama else "Qwen3" if made.config.qk_norm else "Llama"
    assert type(theirs).__name__ == f"{kind}ForCausalLM"
    torch.testing.assert_close(made(IDS), theirs(IDS).logits, rtol=0, atol=1e-5)
    if not llama:
        loaded = load_checkpoint(tmp_path)
        assert loaded.config == made.config.model_copy(update={"init_std": None})
        torch.testing.assert_close(loaded(IDS), made(IDS), rtol=0, atol=1e-6)


def test_openlms_own_checkpoints_hold_no_such_model(model: Transformer, tmp_path: Path):
    with pytest.raises(ConfigError, match="OpenLM has no n_kv_heads, ffn_hidden_dim, rope_theta, norm_eps, qk_norm"):
        export_openlm(model, tmp_path)
    assert not list(tmp_path.iterdir())
