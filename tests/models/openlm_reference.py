"""OpenLM's forward pass and AdamW step, written from its formulas alone, in float64: what ours is compared with."""

import math

import torch
from torch import Tensor

from openlm_pipeline.models.config import ModelConfig

State = dict[str, Tensor]


def reference_logits(weights: State, config: ModelConfig, ids: Tensor) -> Tensor:
    """Logits of sequences, [B, S] -> [B, S, V], in float64; `weights` may require gradients."""
    w = {name: value.double() for name, value in weights.items()}
    batch, length, heads, width = *ids.shape, config.n_heads, config.head_dim

    def norm(name: str, x: Tensor) -> Tensor:
        if config.norm == "rms_norm":
            y = x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
        else:
            y = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
        return y * w.get(f"{name}.weight", 1.0) + w.get(f"{name}.bias", 0.0)

    def rotate(x: Tensor) -> Tensor:
        """[B, S, H, K]: each pair of a head turned by position (or, for head_rotary, by head) times its frequency."""
        kind = config.positional_embedding
        if kind == "none":
            return x
        turns = torch.arange(heads)[None, :, None] if kind == "head_rotary" else torch.arange(length)[:, None, None]
        angle = turns * 10000.0 ** (-2 * torch.arange(width // 2, dtype=torch.float64) / width)
        cos, sin = angle.cos(), angle.sin()
        if kind == "llama_rotary":
            pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
            return torch.view_as_real(pairs * torch.complex(cos, sin)).flatten(-2)
        a, b = x[..., : width // 2], x[..., width // 2 :]
        return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)

    x = w["tok_embeddings.weight"][ids]
    if config.post_embed_norm:
        x = norm("post_embed_norm", x)
    later = torch.ones(length, length, dtype=torch.bool).triu(1)
    for layer in range(config.n_layers):
        p = f"layers.{layer}"
        q, k, v = (norm(f"{p}.attention_norm", x) @ w[f"{p}.attention.in_proj.weight"].T).split(heads * width, dim=-1)
        if config.qk_norm:
            q, k = norm(f"{p}.attention.q_norm", q), norm(f"{p}.attention.k_norm", k)
        q, k, v = (t.view(batch, length, heads, width) for t in (q, k, v))
        scores = torch.einsum("bshk,bthk->bhst", rotate(q), rotate(k)) / math.sqrt(width)
        attention = scores.masked_fill(later, -math.inf).exp()
        attention = attention / attention.sum(-1, keepdim=True)
        out = torch.einsum("bhst,bthk->bshk", attention, v).reshape(batch, length, heads * width)
        x = x + out @ w[f"{p}.attention.out_proj.weight"].T
        y, f = norm(f"{p}.ffn_norm", x), f"{p}.feed_forward"
        if config.ffn == "gelu":
            x = x + _gelu(y @ w[f"{p}._ff_w1.weight"].T) @ w[f"{p}._ff_w2.weight"].T
        elif config.ffn == "gemma_geglu":
            gate = y @ w[f"{f}.gate_proj.weight"].T + w[f"{f}.gate_proj.bias"]
            up = y @ w[f"{f}.up_proj.weight"].T + w[f"{f}.up_proj.bias"]
            x = x + (_gelu(gate) * up) @ w[f"{f}.down_proj.weight"].T + w[f"{f}.down_proj.bias"]
        else:
            gate, up = (y @ w[f"{f}.w12.weight"].T).split(config.ffn_dim, dim=-1)
            x = x + (gate / (1 + (-gate).exp()) * up) @ w[f"{f}.w3.weight"].T
    return norm("norm", x) @ w["tok_embeddings.weight" if config.weight_tying else "output.weight"].T


def _gelu(x: Tensor) -> Tensor:
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def reference_loss(weights: State, config: ModelConfig, inputs: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy in nats."""
    logits = reference_logits(weights, config, inputs)
    return (logits.exp().sum(-1).log() - logits.gather(-1, targets[..., None])[..., 0]).mean()


def reference_training(
    weights: State, config: ModelConfig, batches: Tensor, *, lr: float, decay: float, betas: tuple[float, float]
) -> list[float]:
    """Losses of AdamW steps on samples [steps, B, S + 1], each before its step; decay on every weight, as OpenLM."""
    weights = {name: value.double() for name, value in weights.items()}
    first, second = ({name: torch.zeros_like(value) for name, value in weights.items()} for _ in range(2))
    losses = []
    for step, batch in enumerate(batches, start=1):
        leaves = {name: value.requires_grad_() for name, value in weights.items()}
        loss = reference_loss(leaves, config, batch[:, :-1], batch[:, 1:])
        losses.append(loss.item())
        gradients = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values()))))
        with torch.no_grad():
            for name, g in gradients.items():
                first[name].mul_(betas[0]).add_(g, alpha=1 - betas[0])
                second[name].mul_(betas[1]).add_(g.square_(), alpha=1 - betas[1])
                v = (second[name] / (1 - betas[1] ** step)).sqrt_().add_(1e-8)
                w = weights[name].detach_().mul_(1 - lr * decay)
                w.addcdiv_(first[name], v, value=-lr / (1 - betas[0] ** step))
    return losses
