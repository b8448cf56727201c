"""Configuration of OpenLM models for transformers (4.48 and later). Stands alone: copied into exported folders."""

from transformers import PretrainedConfig


class OpenLMConfig(PretrainedConfig):
    """Reads flat configs, and those of OpenLM that keep their settings in `params_args_dict` or `params`.

    Args:
        dim, n_layers, n_heads, vocab_size, seq_len: sizes; a head is dim // n_heads wide.
        norm_type: one of OpenLM's norms; `lp_` ones are the same as others here.
        positional_embedding_type: rotary, llama_rotary, head_rotary (as good as none) or none.
        ffn_type: swiglu, swiglu_torch, gelu or gemma_geglu.
        n_kv_heads: heads of keys and values; by default as many as of queries.
        ffn_hidden_dim: width inside the feed-forward network; by default OpenLM's.
        rope_theta: base of the rotary frequencies.
        qk_norm_per_head: one norm for the queries of each head, and one for the keys.
        rope_freq_dtype: bfloat16 rounds the rotary frequencies, as OpenLM did under autocast.
    """

    model_type = "openlm"
    _auto_class = "AutoConfig"  # `save_pretrained` copies this file
    attribute_map = {
        "hidden_size": "dim",
        "num_hidden_layers": "n_layers",
        "num_attention_heads": "n_heads",
        "max_position_embeddings": "seq_len",
    }
    keys_to_ignore_at_inference = ["past_key_values", "cache"]

    def __init__(
        self,
        dim=512,
        n_layers=8,
        n_heads=8,
        vocab_size=50432,
        norm_eps=1e-5,
        seq_len=2048,
        post_embed_norm=False,
        weight_tying=False,
        norm_type="default_layer_norm",
        apply_qk_norm=False,
        positional_embedding_type="rotary",
        ffn_type="swiglu",
        attn_name="auto",
        rope_freq_dtype="float32",
        n_kv_heads=None,
        ffn_hidden_dim=None,
        rope_theta=10000.0,
        qk_norm_per_head=False,
        use_cache=True,
        params_args_dict=None,
        **kwargs,
    ):
        p = params_args_dict or kwargs.get("params") or {}
        self.dim = p.get("dim") or p.get("hidden_dim") or dim
        self.n_layers = p.get("n_layers") or n_layers
        self.n_heads = p.get("n_heads") or n_heads
        self.vocab_size = p.get("vocab_size") or vocab_size
        self.norm_eps = p.get("norm_eps") or norm_eps
        self.seq_len = p.get("seq_len") or seq_len
        self.post_embed_norm = p.get("post_embed_norm", post_embed_norm)
        self.weight_tying = p.get("weight_tying", weight_tying)
        self.norm_type = p.get("norm_type") or p.get("model_norm") or norm_type
        self.apply_qk_norm = p.get("apply_qk_norm", p.get("qk_norm", apply_qk_norm))
        self.positional_embedding_type = p.get("positional_embedding_type") or positional_embedding_type
        self.ffn_type = p.get("ffn_type") or ffn_type
        self.attn_name = attn_name
        self.rope_freq_dtype = rope_freq_dtype
        self.n_kv_heads = n_kv_heads or self.n_heads
        self.ffn_hidden_dim = ffn_hidden_dim
        self.rope_theta = rope_theta
        self.qk_norm_per_head = qk_norm_per_head
        self.use_cache = use_cache
        # The head has its own weight unless `weight_tying`; transformers' default of tying would replace it.
        kwargs["tie_word_embeddings"] = self.weight_tying
        super().__init__(**kwargs)
