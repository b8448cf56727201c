"""Model configs: OpenLM's named models, their aliases, and the variants that its flags select.

Sizes and aliases are those of open_lm's `model_configs/*.json`. Norm, qk-norm, position and FFN type stand in flags
there; here they are fields, so that a checkpoint always says what it is.
"""

from typing import Any, Literal

from pydantic import Field, ValidationError, model_validator

from openlm_pipeline.errors import ConfigError, nearest
from openlm_pipeline.strict import Strict, explain

NORMS = (
    "default_layer_norm",
    "lp_layer_norm",
    "gain_only_layer_norm",
    "gain_only_lp_layer_norm",
    "no_wb_layer_norm",
    "rms_norm",
)


class ModelConfig(Strict):
    """Shape and variant of a Transformer."""

    hidden_dim: int = Field(ge=2, le=10**6)
    n_layers: int = Field(ge=1, le=10**4)
    n_heads: int = Field(ge=1, le=10**5)
    seq_len: int = Field(default=2048, ge=1, le=10**9)
    vocab_size: int = Field(default=50432, ge=2, le=2**31)
    post_embed_norm: bool = False
    weight_tying: bool = False
    norm: Literal[NORMS] = "default_layer_norm"
    qk_norm: bool = False
    positional_embedding: Literal["rotary", "llama_rotary", "head_rotary", "none"] = "rotary"
    """`head_rotary` is the rotation over heads of early OpenLM: the same angle for q and k, so no position at all."""
    ffn: Literal["swiglu", "swiglu_torch", "gelu", "gemma_geglu"] = "swiglu"
    """The two SwiGLUs are one; `gemma_geglu` has OpenLM's only biases outside norms."""
    rope_freq_dtype: Literal["float32", "bfloat16"] = "float32"
    """`bfloat16` rounds the rotary frequencies as OpenLM did under autocast; for weights that were trained so."""
    n_kv_heads: int | None = Field(default=None, ge=1)
    """Heads of keys and values, of which each serves n_heads / n_kv_heads heads of queries (GQA,
    https://arxiv.org/abs/2305.13245); by default as many as of queries."""
    ffn_hidden_dim: int | None = Field(default=None, ge=1, le=10**7)
    """Width inside the feed-forward network, in place of OpenLM's."""
    rope_theta: float = Field(default=10_000.0, gt=1)
    """Base of the rotary frequencies; another needs `llama_rotary` or `rotary`."""
    norm_eps: float = Field(default=1e-5, gt=0)
    qk_norm_per_head: bool = False
    """With `qk_norm`: normalize each head's queries and keys by themselves, with one gain for all, as Qwen3 does."""
    init_std: float | None = Field(default=None, gt=0)
    """Standard deviation of all matrices, before truncation at 3 of it, in place of OpenLM's rule."""

    @model_validator(mode="after")
    def _even_heads(self) -> "ModelConfig":
        if self.head_dim < 1 or (self.head_dim % 2 and self.positional_embedding != "none"):
            raise ValueError(f"hidden_dim {self.hidden_dim} // n_heads {self.n_heads} must be even and positive")
        if self.n_heads % self.kv_heads:
            raise ValueError(f"n_heads {self.n_heads} is no multiple of n_kv_heads {self.n_kv_heads}")
        if self.qk_norm_per_head and not self.qk_norm:
            raise ValueError("qk_norm_per_head needs qk_norm")
        return self

    @property
    def beyond_openlm(self) -> list[str]:
        """Fields with a value that OpenLM's model does not have."""
        ours = ("n_kv_heads", "ffn_hidden_dim", "rope_theta", "norm_eps", "qk_norm_per_head")
        return [name for name in ours if getattr(self, name) != type(self).model_fields[name].default]

    @property
    def kv_heads(self) -> int:
        """Heads of keys, and of values."""
        return self.n_kv_heads or self.n_heads

    @property
    def head_dim(self) -> int:
        """Width of one head: floor(hidden_dim / n_heads), as OpenLM has it (488 // 12 = 40 in the 87m model)."""
        return self.hidden_dim // self.n_heads

    @property
    def ffn_dim(self) -> int:
        """Width inside the feed-forward network: gated ones 8/3 of hidden_dim up to a multiple of 256, GELU 4 times."""
        if self.ffn_hidden_dim:
            return self.ffn_hidden_dim
        if self.ffn == "gelu":
            return 4 * self.hidden_dim
        return 256 * -(-int(8 * self.hidden_dim / 3) // 256)


_SIZES = {  # name: (hidden_dim, n_layers, n_heads)
    "open_lm_11m": (96, 12, 12),
    "open_lm_25m": (192, 12, 12),
    "open_lm_41m": (288, 12, 12),
    "open_lm_87m": (488, 12, 12),
    "open_lm_160m": (768, 12, 12),
    "open_lm_410m": (1024, 24, 16),
    "open_lm_830m": (1536, 24, 16),
    "open_lm_1b": (2048, 24, 16),
    "open_lm_3b": (2560, 32, 32),
    "open_lm_7b": (4096, 32, 32),
    "open_lm_11m_v2": (96, 8, 4),
    "open_lm_79m_v2": (512, 8, 4),
    "open_lm_154m_v2": (576, 24, 8),
    "open_lm_411m_v2": (1024, 24, 8),
}
_1B = {"hidden_dim": 2048, "n_layers": 24, "n_heads": 16}
MODELS = {
    **{name: ModelConfig(hidden_dim=d, n_layers=n, n_heads=h) for name, (d, n, h) in _SIZES.items()},
    "open_lm_1b_old": ModelConfig(
        **_1B, norm="default_layer_norm", qk_norm=False, positional_embedding="head_rotary", ffn="swiglu"
    ),
    "open_lm_1b_swiglutorch": ModelConfig(**_1B, ffn="swiglu_torch"),
    "open_lm_3b_swiglutorch": ModelConfig(hidden_dim=2560, n_layers=32, n_heads=32, ffn="swiglu_torch"),
    "open_lm_7b_swiglutorch": ModelConfig(hidden_dim=4096, n_layers=32, n_heads=32, ffn="swiglu_torch"),
    "open_lm_1b_geglu": ModelConfig(**_1B, ffn="gemma_geglu"),
    "m1b_tiktoken": ModelConfig(**_1B, vocab_size=50304),
    "llama2_7b": ModelConfig(
        hidden_dim=4096,
        n_layers=32,
        n_heads=32,
        seq_len=4096,
        vocab_size=32000,
        norm="rms_norm",
        positional_embedding="llama_rotary",
        ffn="swiglu",
    ),
    "open_lm_test_tiny": ModelConfig(hidden_dim=16, n_layers=2, n_heads=2, seq_len=16, vocab_size=16),
}
"""Fields that OpenLM's JSON file of a model gives are set here too: there they win over flags."""
ALIASES = {
    "open_lm_411m": "open_lm_410m",  # the name in OpenLM's README, which has no config file there
    "d=1024_l=24_h=8": "open_lm_411m_v2",  # DCLM's
    "quark_neox": "open_lm_11m",
    "atom_neox": "open_lm_25m",
    "aphid_neox": "open_lm_87m",
    "ant_neox": "open_lm_160m",
    "potato_neox": "open_lm_410m",
    "marmot_neox": "open_lm_830m",
    "m1b_neox": "open_lm_1b",
    "g3b_neox": "open_lm_3b",
    "l7b_neox": "open_lm_7b",
}
_NOT_TRANSFORMERS = {
    "mamba": "is a state-space model (mamba_ssm), not a Transformer",
    "moe": "has experts (megablocks), and only dense models are built here",
}


def model_config(name: str) -> ModelConfig:
    """The config of a known model or alias.

    Raises:
        ConfigError: no such name; the message suggests the nearest, or says why it is not here.
    """
    for word in _NOT_TRANSFORMERS:
        if word in name.lower().split("_"):
            raise not_dense(f"model {name!r}", word)
    try:
        return MODELS[ALIASES.get(name, name)]
    except KeyError:
        hint = nearest(name, [*MODELS, *ALIASES])
        raise ConfigError(f"there is no model {name!r}; {hint} (`openlm models` lists them)") from None


def resolve_model(settings: dict[str, Any]) -> ModelConfig:
    """`{"name": ..., overrides}` or all fields of a new config -> ModelConfig.

    Raises:
        ConfigError: unknown name or field, or a value out of range.
    """
    fields = dict(settings)
    base = model_config(str(fields.pop("name"))).model_dump() if "name" in fields else {}
    try:
        return ModelConfig(**{**base, **fields})
    except ValidationError as e:
        raise explain(e, "model") from e


def not_dense(what: str, kind: str) -> ConfigError:
    """The refusal of a `moe` or `mamba` model, with its reason."""
    return ConfigError(f"{what} {_NOT_TRANSFORMERS[kind]}; use a dense model such as open_lm_1b, or OpenLM itself")
