"""Attention within documents, and generation with a cache and padding: both give what plain calls give."""

import pytest
import torch
from torch import Tensor

from openlm_pipeline.models import create_model
from openlm_pipeline.models.attention import KVCache, document_mask
from openlm_pipeline.models.config import NORMS, ModelConfig
from openlm_pipeline.models.transformer import Transformer

SMALL = ModelConfig(hidden_dim=48, n_layers=2, n_heads=3, seq_len=32, vocab_size=61)
IDS = torch.randint(0, 61, (2, 20), generator=torch.Generator().manual_seed(0))
KINDS = ["rotary", "llama_rotary", "head_rotary", "none"]


@pytest.fixture(scope="module", params=KINDS)
def model(request: pytest.FixtureRequest) -> Transformer:
    return create_model(SMALL, positional_embedding=request.param, qk_norm=True).eval()


@torch.no_grad()
def test_each_document_is_as_if_it_stood_alone(model: Transformer):
    documents = torch.tensor([[0] * 7 + [1] * 13, [5] * 1 + [6] * 11 + [5] * 8])
    logits = model(IDS, documents_BS=documents)
    torch.testing.assert_close(logits[0, :7], model(IDS[:1, :7])[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(logits[0, 7:], model(IDS[:1, 7:])[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(logits[1, 1:12], model(IDS[1:, 1:12])[0], rtol=0, atol=1e-5)
    assert not torch.allclose(logits[0, 7:], model(IDS)[0, 7:], atol=1e-3)


def test_gradients_within_documents_are_those_of_the_documents_alone():
    model = create_model(SMALL)
    documents = torch.tensor([[0] * 9 + [1] * 10])
    inputs, targets = IDS[:1, :-1], IDS[:1, 1:]
    model(inputs, targets, documents_BS=documents)[0].backward()
    together = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    for part in (slice(0, 9), slice(9, 19)):
        model(inputs[:, part], targets[:, part])[0].backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(together[name], p.grad, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_one_document_is_plain_attention():
    model = create_model("open_lm_11m", n_layers=2, vocab_size=61)  # heads of 8, which the CPU's kernel gets padded
    torch.testing.assert_close(model(IDS, documents_BS=torch.zeros_like(IDS)), model(IDS), rtol=0, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_block_masks_on_a_gpu_give_the_loss_and_gradients_of_the_plain_mask():
    config = SMALL.model_copy(update={"hidden_dim": 128, "n_heads": 2})
    ids = torch.randint(0, 61, (2, 257), generator=torch.Generator().manual_seed(1))
    documents = (ids[:, :-1] == 0).cumsum(1)
    results = []
    for device in ("cpu", "cuda"):
        model = create_model(config, device=device)
        x = ids.to(device)
        ce, _ = model(x[:, :-1], x[:, 1:], documents_BS=documents.to(device))
        ce.backward()
        results.append([ce.detach().cpu(), *(p.grad.cpu() for p in model.parameters())])
    assert not isinstance(document_mask(documents.cuda(), 64), Tensor)
    for on_cpu, on_gpu in zip(*results, strict=True):
        torch.testing.assert_close(on_gpu, on_cpu, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_tokens_one_by_one_and_in_pieces_give_the_logits_of_all_at_once(model: Transformer):
    expected = model(IDS)
    for pieces in ([1] * 20, [20], [7, 1, 1, 11]):
        cache = KVCache(model.config, batch_size=2, max_len=20)
        parts = [model(ids, cache=cache) for ids in IDS.split(pieces, dim=1)]
        torch.testing.assert_close(torch.cat(parts, dim=1), expected, rtol=0, atol=1e-5)
        assert cache.length == 20
    with pytest.raises(ValueError, match="room for 20 positions, and 21"):
        model(IDS[:, :1], cache=cache)


@torch.no_grad()
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_cache_gives_the_logits_of_all_at_once_in_every_variant(norm: str, kind: str):
    variants = [
        {"qk_norm": True, "ffn": "gelu", "post_embed_norm": True},
        {"ffn": "gemma_geglu", "weight_tying": True, "n_kv_heads": 1},
        {"qk_norm": True, "qk_norm_per_head": True, "rope_freq_dtype": "bfloat16", "ffn_hidden_dim": 40},
    ]
    for variant in variants:
        model = create_model(SMALL.model_copy(update={"norm": norm, "positional_embedding": kind, **variant})).eval()
        cache = KVCache(model.config, batch_size=2, max_len=20)
        parts = [model(ids, cache=cache) for ids in IDS.split([9, *[1] * 11], dim=1)]
        torch.testing.assert_close(torch.cat(parts, dim=1), model(IDS), rtol=0, atol=1e-5)
