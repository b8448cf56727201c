"""Switches of execution change how a model computes, not what; settings that cannot be had are refused."""

import importlib
import math
import sys
from functools import partial, partialmethod

import pytest
import torch
from small_run import SmallRun

from openlm_pipeline.errors import ConfigError
from openlm_pipeline.models import ModelConfig, create_model
from train.parallel import require_float8, to_float8


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> SmallRun:
    small = SmallRun(tmp_path_factory.mktemp("plain"), (4, 8))
    small.train()
    return small


@pytest.fixture(autouse=True)
def leave_determinism_as_it_was():
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(
    "override",
    [
        "activation_checkpointing=full",
        "activation_checkpointing=selective",
        "reshard_after_forward=false",
        "deterministic=true",
    ],
)
def test_losses_are_bitwise_the_same(plain: SmallRun, small: SmallRun, override: str):
    small.train(f"execution.{override}")
    assert small.losses() == plain.losses()
    assert torch.are_deterministic_algorithms_enabled() == (override == "deterministic=true")


@pytest.mark.parametrize("overrides", [["loss_chunk=48"], ["micro_batch=1", "loss_chunk=20"]])
def test_losses_are_the_same_up_to_the_order_of_sums(plain: SmallRun, small: SmallRun, overrides: list[str]):
    small.train(*(f"execution.{o}" for o in overrides))
    assert small.losses() == pytest.approx(plain.losses(), rel=1e-6)


@pytest.fixture
def no_code_generated(monkeypatch) -> None:
    """Blocks are traced, their backward passes too, and then run without the C++ that takes a minute to compile."""
    compile_block = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", partialmethod(compile_block, backend="aot_eager"))
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))


def test_a_compiled_model_has_the_same_losses_with_one_graph_for_all_blocks(
    plain: SmallRun, small: SmallRun, no_code_generated: None
):
    torch._dynamo.reset()  # what earlier tests compiled
    counters = torch._dynamo.utils.counters
    counters.clear()
    small.train("execution.compile=true", "execution.activation_checkpointing=selective", "milestones=[1024]")
    assert counters["stats"]["unique_graphs"] == 6  # block, norm and loss, each for training and for validation
    assert not counters["graph_break"]
    expected = {step: loss for step, loss in plain.losses().items() if step <= 4}
    assert small.losses() == pytest.approx(expected, rel=1e-6)


@pytest.mark.drill
def test_code_generated_for_blocks_gives_the_same_losses(plain: SmallRun, small: SmallRun):
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    compiled = ("execution.compile=true", "execution.activation_checkpointing=selective")
    small.train(*compiled, "milestones=[1024]", "validation=null")
    assert counters["stats"]["unique_graphs"] == 3  # block, norm, loss
    assert counters["inductor"]
    expected = {step: loss for step, loss in plain.losses().items() if step <= 4}
    assert small.losses() == pytest.approx(expected, rel=1e-6)


def test_replicas_that_do_not_divide_the_processes_become_fewer(small: SmallRun, capfd):
    small.train("execution.replicas=2", "milestones=[1024]")
    assert "1 groups with all weights, not 2: there are 1 processes" in capfd.readouterr().out


def test_bf16_on_a_processor_without_it_trains_with_a_note(small: SmallRun, monkeypatch, capfd):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True})
    small.train("training.precision=bf16", "milestones=[256]")
    assert "no bfloat16 instructions: training.precision=fp32 may be faster" in capfd.readouterr().out
    assert list(small.losses()) == [1]


def test_full_checkpointing_keeps_less_than_selective_and_that_less_than_none():
    from train.parallel import with_activation_checkpointing

    model = create_model(ModelConfig(hidden_dim=64, n_layers=1, n_heads=2, vocab_size=64, seq_len=32))
    block, kept = model.layers[0], {}
    variants = {"none": block, "selective": with_activation_checkpointing(block, selective=True)}
    variants["full"] = with_activation_checkpointing(block, selective=False)
    for name, variant in variants.items():
        computed: dict[str, int] = {}

        class Count(torch.utils._python_dispatch.TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                computed[str(func)] = computed.get(str(func), 0) + 1  # noqa: B023 - used up within this iteration
                return func(*args, **(kwargs or {}))

        x = torch.randn(2, 32, 64, requires_grad=True)
        with Count():
            variant(x, None).sum().backward()
        kept[name] = computed
    products = {name: c["aten.mm.default"] for name, c in kept.items()}
    assert products["selective"] == products["none"] < products["full"]
    assert kept["selective"]["aten.silu.default"] == 2 * kept["none"]["aten.silu.default"]


def test_float8_on_a_cpu_is_refused():
    with pytest.raises(ConfigError, match="training.float8 needs an NVIDIA GPU of the H100's kind or later; here is a"):
        require_float8(torch.device("cpu"))


def test_float8_without_torchao_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao", None)
    monkeypatch.setitem(sys.modules, "torchao.float8", None)
    with pytest.raises(ConfigError, match="pip install"):
        to_float8(create_model("open_lm_11m", device="meta"))


@pytest.fixture
def torchao():
    pytest.importorskip("torchao", reason="torchao is not installed")
    return importlib.import_module("torchao.float8.float8_linear")


def test_float8_replaces_the_matrices_of_blocks_on_meta(torchao):
    model = create_model("open_lm_160m", device="meta")
    names = list(model.state_dict())
    to_float8(model)
    replaced = [name for name, m in model.named_modules() if isinstance(m, torchao.Float8Linear)]
    assert len(replaced) == 4 * 12
    assert all(name.startswith("layers.") for name in replaced)
    assert list(model.state_dict()) == names


def test_float8_leaves_matrices_whose_sides_do_not_fit(torchao):
    model = create_model("open_lm_87m", device="meta")  # hidden_dim 488
    to_float8(model)
    assert not any(isinstance(m, torchao.Float8Linear) for m in model.modules())


def test_emulated_float8_is_near_to_fp32(torchao):
    config = ModelConfig(hidden_dim=64, n_layers=2, n_heads=2, vocab_size=64, seq_len=16)
    ids = torch.randint(0, 64, (2, 17))
    losses = {}
    for emulated in (False, True):
        model = create_model(config)
        if emulated:
            to_float8(model, emulate=True)
        ce_sum, _ = model(ids[:, :-1], ids[:, 1:])
        ce_sum.backward()
        assert all(torch.isfinite(p.grad).all() for p in model.parameters())
        losses[emulated] = ce_sum.item() / 32
    assert losses[True] != losses[False]
    assert losses[True] == pytest.approx(losses[False], rel=0.02)
    assert losses[False] == pytest.approx(math.log(64), rel=0.2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_float8_trains_on_a_gpu(small: SmallRun, plain: SmallRun):
    small.train("training.float8=true", "training.precision=bf16")
    assert small.losses()[8] == pytest.approx(plain.losses()[8], rel=0.05)
