"""The Transformer computes what OpenLM's does: checked against an independent float64 implementation."""

import pytest
import torch
import torch.nn.functional as F
from openlm_reference import reference_logits, reference_training

from openlm_pipeline.models import create_model
from openlm_pipeline.models.config import NORMS, ModelConfig
from openlm_pipeline.models.init import initialize
from openlm_pipeline.models.transformer import LOSS_CHUNK, Output, Transformer

TINY = ModelConfig(hidden_dim=20, n_layers=2, n_heads=3, seq_len=32, vocab_size=50)  # 3 heads of 6: 18 of 20 wide


def randomized(config: ModelConfig, seed: int = 0) -> Transformer:
    """A model whose gains and biases are not 1 and 0, so that leaving one out shows."""
    model = create_model(config, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.3)
    return model


VARIANTS = [
    *({"norm": norm} for norm in NORMS),
    *({"norm": norm, "qk_norm": True} for norm in ("default_layer_norm", "gain_only_lp_layer_norm", "rms_norm")),
    *({"positional_embedding": kind} for kind in ("llama_rotary", "head_rotary", "none")),
    {"ffn": "swiglu_torch"},
    {"ffn": "gelu", "post_embed_norm": True},
    {"ffn": "gemma_geglu"},
    {"weight_tying": True},
]


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: "-".join(map(str, v.values())))
def test_loss_and_logits_equal_the_reference(variant: dict):
    config = TINY.model_copy(update=variant)
    model = randomized(config)
    ids = torch.randint(0, config.vocab_size, (2, 13), generator=torch.Generator().manual_seed(1))
    inputs, targets = ids[:, :-1], ids[:, 1:]
    expected = reference_logits(model.state_dict(), config, inputs)

    with torch.no_grad():
        logits = model(inputs)
        ce, squared_log_partition = model(inputs, targets)
    assert logits.dtype == ce.dtype == torch.float32
    torch.testing.assert_close(logits.double(), expected, rtol=1e-5, atol=1e-5)
    loss = F.cross_entropy(expected.flatten(0, 1), targets.flatten())
    assert ce.item() / targets.numel() == pytest.approx(loss.item(), abs=1e-5)
    assert squared_log_partition.item() == pytest.approx(expected.logsumexp(-1).square().sum().item(), rel=1e-5)


STEPS = {"lr": 3e-4, "decay": 0.1, "betas": (0.9, 0.95)}


def losses_of_five_steps(model: Transformer, batches: torch.Tensor) -> list[float]:
    """fp32 losses with torch's AdamW, each before its step."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=STEPS["lr"], weight_decay=STEPS["decay"], betas=STEPS["betas"], eps=1e-8, fused=True
    )
    losses = []
    for batch in batches:
        ce, _ = model(batch[:, :-1], batch[:, 1:])
        loss = ce / batch[:, 1:].numel()
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return losses


def random_batches(config: ModelConfig, num_sequences: int, seq_len: int) -> torch.Tensor:
    shape = (5, num_sequences, seq_len + 1)
    return torch.randint(0, config.vocab_size, shape, generator=torch.Generator().manual_seed(4))


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: "-".join(map(str, v.values())))
def test_first_five_training_losses_equal_the_reference(variant: dict):
    model = randomized(TINY.model_copy(update=variant))
    batches = random_batches(model.config, 2, 12)
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}  # each weight once, as its optimizer
    expected = reference_training(weights, model.config, batches, **STEPS)
    assert losses_of_five_steps(model, batches) == pytest.approx(expected, abs=1e-5)
    assert expected[0] != pytest.approx(expected[4], abs=1e-3)


def test_first_five_training_losses_of_11m_equal_the_reference():
    model = create_model("open_lm_11m")
    batches = random_batches(model.config, 1, 24)
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    expected = reference_training(weights, model.config, batches, **STEPS)
    assert losses_of_five_steps(model, batches) == pytest.approx(expected, abs=1e-5)


def test_positions_without_a_target_do_not_count():
    model = randomized(TINY)
    ids = torch.randint(0, 50, (2, 9), generator=torch.Generator().manual_seed(2))
    targets = ids.roll(-1, dims=1)
    targets[:, -1] = -100
    targets[0, 2:5] = -100
    logits = model(ids)
    ce, squared_log_partition = model(ids, targets)
    torch.testing.assert_close(ce, F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum"))
    torch.testing.assert_close(squared_log_partition, logits.logsumexp(-1)[targets != -100].square().sum())
    assert [s.item() for s in model(ids, torch.full_like(targets, -100))] == [0.0, 0.0]


def test_chunked_loss_equals_the_whole_one_with_its_gradients():
    num_positions = 2 * LOSS_CHUNK + 7
    torch.manual_seed(0)
    x = torch.randn(num_positions, 8, requires_grad=True)
    output = Output(ModelConfig(hidden_dim=8, n_layers=1, n_heads=1, vocab_size=16))
    targets = torch.randint(0, 16, (num_positions,))
    targets[::5] = -100

    ce, squared_log_partition = output(x, targets)
    gradients = torch.autograd.grad(ce + 0.1 * squared_log_partition, (x, output.weight))
    logits = output(x)
    whole_ce = F.cross_entropy(logits, targets, reduction="sum")
    whole_squared = logits.logsumexp(-1)[targets != -100].square().sum()
    torch.testing.assert_close((ce, squared_log_partition), (whole_ce, whole_squared))
    expected = torch.autograd.grad(whole_ce + 0.1 * whole_squared, (x, output.weight))
    torch.testing.assert_close(gradients, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["rotary", "llama_rotary", "head_rotary", "none"])
def test_no_position_sees_a_later_token(kind: str):
    model = randomized(TINY.model_copy(update={"positional_embedding": kind}))
    ids = torch.randint(0, 50, (1, 12), generator=torch.Generator().manual_seed(3))
    changed = ids.clone()
    changed[0, 7:] = (changed[0, 7:] + 1) % 50
    before, after = model(ids), model(changed)
    torch.testing.assert_close(before[:, :7], after[:, :7])
    assert not torch.allclose(before[:, 7:], after[:, 7:], atol=1e-3)


@pytest.mark.parametrize(
    ("kind", "order_matters"), [("rotary", True), ("llama_rotary", True), ("head_rotary", False), ("none", False)]
)
def test_order_of_earlier_tokens_matters_only_with_positions(kind: str, order_matters: bool):
    # One layer: with more, causal attention alone lets later layers see the order.
    model = randomized(TINY.model_copy(update={"positional_embedding": kind, "n_layers": 1}))
    ids = torch.arange(12)[None]
    shuffled = torch.cat((ids[:, :-1].flip(1), ids[:, -1:]), dim=1)
    difference = (model(ids)[0, -1] - model(shuffled)[0, -1]).abs().max().item()
    assert difference > 1e-3 if order_matters else difference < 1e-5


def test_rotary_frequencies_survive_the_meta_device_and_a_cast_to_bfloat16():
    expected = torch.tensor([10000 ** (-2 * j / 6) for j in range(3)])
    with torch.device("meta"):
        model = Transformer(TINY)
    model.to_empty(device="cpu")
    initialize(model, TINY, seed=0)
    model.bfloat16()
    assert model.output.weight.dtype == torch.bfloat16
    for layer in model.layers:
        assert layer.attention.pos_embed.inv_freq.dtype == torch.float32
        torch.testing.assert_close(layer.attention.pos_embed.inv_freq, expected)
    angles = torch.outer(torch.arange(2048.0), expected)
    torch.testing.assert_close(model.rotation(torch.arange(2048)).cos[:, 0], angles.cos(), rtol=0, atol=1e-3)
    exact = create_model(TINY)(torch.arange(8)[None])
    torch.testing.assert_close(model(torch.arange(8)[None]), exact, rtol=0, atol=0.1)


def test_a_checkpoint_brings_its_own_frequencies():
    model = create_model(TINY)
    state = model.state_dict()
    ours = torch.tensor([1.0, 0.5, 0.25])
    model.load_state_dict({k: ours if k.endswith("inv_freq") else v for k, v in state.items()})
    assert torch.equal(model.rotation(torch.arange(4)).cos[3, 0], (3 * ours).cos())


@pytest.mark.parametrize("kind", ["rotary", "llama_rotary"])
def test_bfloat16_switch_rounds_the_frequencies_and_nothing_else(kind: str):
    exact = create_model(ModelConfig(hidden_dim=128, n_layers=1, n_heads=1, vocab_size=50, positional_embedding=kind))
    rounded = create_model(exact.config.model_copy(update={"rope_freq_dtype": "bfloat16"}))
    frequencies = torch.tensor([10000 ** (-2 * j / 128) for j in range(64)])
    cos = rounded.rotation(torch.arange(2048)).cos[:, 0]
    torch.testing.assert_close(cos[2047], (2047 * frequencies.bfloat16().float()).cos())
    assert (cos - exact.rotation(torch.arange(2048)).cos[:, 0]).abs().max() > 0.1
    assert all(torch.equal(v, exact.state_dict()[k]) for k, v in rounded.state_dict().items())


def test_lp_norm_stays_in_the_type_of_autocast_and_the_default_norm_does_not():
    x = torch.randn(2, 20)
    for name, dtype in (("lp_layer_norm", torch.bfloat16), ("default_layer_norm", torch.float32)):
        norm = create_model(TINY.model_copy(update={"norm": name})).norm
        with torch.autocast("cpu", torch.bfloat16):
            assert norm(x).dtype == dtype
        assert norm(x).dtype == torch.float32


def test_sequences_longer_than_the_config_work():
    assert randomized(TINY)(torch.zeros(1, 40, dtype=torch.long)).shape == (1, 40, 50)
