"""Causal attention for bfloat16 on a CPU, one head and block of queries at a time.

A block multiplies only with the keys up to its end, and its scores stay in the processor's cache. SDPA on a CPU takes
1.2 to 1.5 times as long; it keeps in fp32 the scores that are rounded here. Both passes are operators of their own:
torch.compile takes each as it is.
Shape suffixes: B batch, H heads, S sequence, K head_dim.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

_BLOCK = 256
"""Queries at a time."""


def _probabilities(q_SK: Tensor, k_SK: Tensor) -> Iterator[tuple[int, int, Tensor]]:
    """Softmax of the scores of each block of queries, which are scaled already: (first, end, [end - first, end])."""
    seq_len = len(q_SK)
    future = torch.full((_BLOCK, _BLOCK), float("-inf"), dtype=q_SK.dtype).triu_(1)
    for start in range(0, seq_len, _BLOCK):
        end = min(start + _BLOCK, seq_len)
        scores = q_SK[start:end] @ k_SK[:end].T
        scores[:, start:] += future[: end - start, : end - start]
        yield start, end, scores.softmax(-1)


def _empty(like_BHSK: Tensor) -> Tensor:
    """[B, H, S, K], laid out in memory as [B, S, H, K], which the layer after attention reads as it is."""
    return torch.empty_like(like_BHSK.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)


@torch.library.custom_op("openlm::block_attention", mutates_args=())
def block_attention(q_BHSK: Tensor, k_BHSK: Tensor, v_BHSK: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(K)) v, each position seeing those up to itself, [B, H, S, K]."""
    out_BHSK, scaled_BHSK = _empty(v_BHSK), q_BHSK * q_BHSK.shape[-1] ** -0.5
    for b, h in torch.cartesian_prod(*map(torch.arange, q_BHSK.shape[:2])).tolist():
        for start, end, weights in _probabilities(scaled_BHSK[b, h], k_BHSK[b, h]):
            out_BHSK[b, h, start:end] = weights @ v_BHSK[b, h, :end]
    return out_BHSK


@torch.library.custom_op("openlm::block_attention_backward", mutates_args=())
def _backward(grad_BHSK: Tensor, q_BHSK: Tensor, k_BHSK: Tensor, v_BHSK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    scale = q_BHSK.shape[-1] ** -0.5
    scaled_BHSK, grads = q_BHSK * scale, (_empty(q_BHSK), _empty(k_BHSK), _empty(v_BHSK))
    for b, h in torch.cartesian_prod(*map(torch.arange, q_BHSK.shape[:2])).tolist():
        grad, q, k, v = (t[b, h] for t in (grad_BHSK, scaled_BHSK, k_BHSK, v_BHSK))
        grad_k, grad_v = (torch.zeros_like(t, dtype=torch.float32) for t in (k, v))
        for start, end, weights in _probabilities(q, k):
            grad_v[:end] += weights.T @ grad[start:end]
            grad_weights = grad[start:end] @ v[:end].T
            grad_scores = torch._softmax_backward_data(grad_weights, weights, -1, weights.dtype)
            grads[0][b, h, start:end] = (grad_scores @ k[:end]) * scale
            grad_k[:end] += grad_scores.T @ q[start:end]
        grads[1][b, h], grads[2][b, h] = grad_k, grad_v
    return grads


block_attention.register_fake(lambda q, k, v: _empty(v))
_backward.register_fake(lambda grad, q, k, v: (_empty(q), _empty(k), _empty(v)))
block_attention.register_autograd(
    lambda ctx, grad: _backward(grad, *ctx.saved_tensors),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)
