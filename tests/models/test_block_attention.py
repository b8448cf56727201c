"""Attention by blocks of queries is causal attention to the precision of bfloat16, and the same bits each time."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F

from openlm_pipeline.models.attention import attend
from openlm_pipeline.models.block_attention import block_attention

SHAPE = (2, 600, 3, 64)  # B, S, H, K; 600 is no multiple of the block


def inputs(dtype: torch.dtype = torch.bfloat16) -> list[torch.Tensor]:
    """Queries, keys, values and a gradient, laid out as a layer makes them."""
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(SHAPE, generator=generator).bfloat16() for _ in range(4)]
    return [t.to(dtype).transpose(1, 2).requires_grad_() for t in tensors]


def with_gradients(attention, q, k, v, grad) -> tuple[torch.Tensor, ...]:
    out = attention(q, k, v)
    return out, *torch.autograd.grad(out, (q, k, v), grad)


def sdpa(q, k, v) -> torch.Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def test_it_is_within_twice_the_rounding_error_of_torchs_own():
    exact = with_gradients(sdpa, *inputs(torch.float64))
    ours, torchs = with_gradients(block_attention, *inputs()), with_gradients(sdpa, *inputs())
    for name, reference, a, b in zip(("out", "q", "k", "v"), exact, ours, torchs):
        error, torchs_error = ((x - reference).norm() / reference.norm() for x in (a, b))
        assert error < 2 * torchs_error, name


def test_a_sequence_gives_the_same_bits_in_any_batch_and_at_any_time():
    q, k, v, grad = inputs()
    both = with_gradients(block_attention, q, k, v, grad)
    second = with_gradients(block_attention, *(t[1:].detach().requires_grad_() for t in (q, k, v)), grad[1:])
    for whole, again, part in zip(both, with_gradients(block_attention, q, k, v, grad), second):
        assert torch.equal(whole, again)
        assert torch.equal(whole[1:], part)


def test_no_position_sees_a_later_one():
    q, k, v, _ = inputs()
    changed_k, changed_v = k.detach().clone(), v.detach().clone()
    changed_k[:, :, 300:], changed_v[:, :, 300:] = 7.0, -7.0
    assert torch.equal(block_attention(q, k, v)[:, :, :300], block_attention(q, changed_k, changed_v)[:, :, :300])


def test_its_shapes_and_gradients_are_what_the_compiler_is_told():
    torch.library.opcheck(block_attention, inputs()[:3])


@pytest.mark.parametrize("dtype, is_used", [("bfloat16", True), ("float32", False)])
def test_bfloat16_uses_it_where_it_is_asked_for(dtype: str, is_used: bool):
    q, k, v, _ = inputs(getattr(torch, dtype))
    assert torch.equal(attend(q, k, v, None, rounded=True), block_attention(q, k, v)) == is_used
    assert torch.equal(attend(q, k, v, None), sdpa(q, k, v))


def test_compiled_without_a_graph_break_it_has_the_same_bits():
    compiled = torch.compile(partial(attend, mask=None, rounded=True), fullgraph=True, backend="aot_eager")
    for a, b in zip(with_gradients(compiled, *inputs()), with_gradients(block_attention, *inputs())):
        assert torch.equal(a, b)
