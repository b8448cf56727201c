"""A GPU trains and scores as a CPU does, and stops, saves and resumes without a trace.

`OPENLM_TEST_DEVICE=cpu` runs these tests on a CPU, against itself, where there is no GPU: so they are known to execute.
"""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small_run import REPOSITORY, SmallRun
from torch.nn import functional as F
from waiting import wait_until

from openlm_pipeline.checkpoints.folders import list_checkpoints
from openlm_pipeline.checkpoints.reading import load_model
from openlm_pipeline.evaluation.model import NativeModel, Precision
from openlm_pipeline.evaluation.scorer import score_questions
from openlm_pipeline.evaluation.tasks import Request
from openlm_pipeline.models import ModelConfig, count_parameters, create_model
from openlm_pipeline.models.attention import document_mask
from openlm_pipeline.models.transformer import Transformer

DEVICE = os.environ.get("OPENLM_TEST_DEVICE", "cuda")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE == "cuda" and not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CONFIG = ModelConfig(hidden_dim=256, n_layers=3, n_heads=4, seq_len=256, vocab_size=320)
DETERMINISTIC = ("execution.deterministic=true", "training.precision=bf16", "validation=null")


def trainer(small: SmallRun, device: str, *overrides: str) -> subprocess.Popen:
    """`python -m train` on the run, where `cpu` hides the GPU."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENLM_HOME": str(small.home.root)}
    if device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    command = [sys.executable, "-m", "train", str(small.recipe), *overrides]
    with small.log_file.open("a") as log:
        return subprocess.Popen(command, cwd=REPOSITORY, env=environment, stdout=log, stderr=subprocess.STDOUT)


def train(small: SmallRun, device: str, *overrides: str) -> None:
    assert trainer(small, device, *overrides).wait() == 0, small.log()


def gradient_norms(small: SmallRun) -> list[float]:
    return [r["grad_norm"] for r in small.run.read_metrics() if "grad_norm" in r]


# From the same weights: the first step differs by rounding alone; later ones amplify it.
@pytest.mark.parametrize(("precision", "first", "later"), [("fp32", 1e-5, 1e-3), ("bf16", 3e-3, 2e-2)])
def test_training_steps_are_those_of_a_cpu(tmp_path: Path, precision: str, first: float, later: float):
    runs = {device: SmallRun(tmp_path / device, (8,)) for device in ("cpu", DEVICE + "_here")}
    for device, small in runs.items():
        train(small, device.removesuffix("_here"), f"training.precision={precision}")
        assert f"on 1 x {device.removesuffix('_here')}" in small.log()
    there, here = runs.values()
    assert list(here.losses()) == list(range(1, 9))
    assert here.losses()[1] == pytest.approx(there.losses()[1], rel=first)
    assert gradient_norms(here)[0] == pytest.approx(gradient_norms(there)[0], rel=10 * first)
    assert here.losses() == pytest.approx(there.losses(), rel=later)
    assert here.validation_losses() == pytest.approx(there.validation_losses(), rel=later)
    assert here.losses()[8] < 0.9 * here.losses()[1]


def losses_within_documents(device: str, compiled: bool, steps: int = 6) -> list[float]:
    """Losses of some AdamW steps of one model, its data seeded, attention within documents."""
    generator = torch.Generator().manual_seed(3)
    torch.manual_seed(0)
    model = create_model(CONFIG).to(device)
    if compiled:
        for block in model.layers:
            block.compile(fullgraph=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(steps):
        ids = torch.randint(0, 40, (4, CONFIG.seq_len + 1), generator=generator).to(device)
        is_end = (ids[:, :-1] == 0).long()
        documents = is_end.cumsum(1) - is_end
        ce_sum, _ = model(ids[:, :-1], ids[:, 1:], documents_BS=documents)
        (ce_sum / ids[:, 1:].numel()).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(ce_sum.item() / ids[:, 1:].numel())
    if device == "cuda":
        assert not isinstance(document_mask(documents, CONFIG.head_dim), torch.Tensor)
    return losses


def test_compiled_blocks_within_documents_learn_as_a_plain_mask_does():
    """Attention over all documents gives losses that are off by 3e-3 to 4e-2."""
    dense = losses_within_documents("cpu", compiled=False)
    assert losses_within_documents(DEVICE, compiled=DEVICE == "cuda") == pytest.approx(dense, rel=5e-4)
    assert dense[-1] < dense[0]


def test_a_run_that_is_stopped_and_resumed_is_bitwise_the_one_left_alone(tmp_path: Path):
    whole, stopped = (SmallRun(tmp_path / name, (400,)) for name in ("whole", "stopped"))
    train(whole, DEVICE, *DETERMINISTIC)
    process = trainer(stopped, DEVICE, *DETERMINISTIC)
    wait_until(lambda: stopped.run.metrics_file.exists() and max(stopped.losses(), default=0) >= 10, process)
    process.send_signal(signal.SIGTERM)
    process.wait()
    outcome = stopped.run.read_outcome()
    assert outcome["status"] == "preempted" and 10 <= outcome["step"] < 400, outcome
    assert outcome["step"] in stopped.steps_on_disk()
    train(stopped, DEVICE, *DETERMINISTIC)
    assert "resumed from step-" in stopped.log()
    assert stopped.losses() == whole.losses()
    weights = []
    for small in (whole, stopped):
        checkpoint = list_checkpoints(small.run.checkpoints, small.run.fingerprint, warn=pytest.fail)[-1]
        weights.append(load_model(checkpoint).state_dict())
    assert weights[0].keys() == weights[1].keys()
    for name, value in weights[0].items():
        assert torch.equal(value, weights[1][name]), name


COPY_BYTES_PER_SECOND = 4e9
"""Less than PCIe and a CPU's memory do."""


def test_a_save_in_the_background_stalls_training_for_a_step_and_a_copy(tmp_path: Path):
    """The second save, for the first one takes the memory for the copy."""
    small = SmallRun(tmp_path, (3, 12))
    model = "model={hidden_dim: 512, n_layers: 8, n_heads: 8, vocab_size: 260}"
    train(small, DEVICE, model, "training.lr=1e-4", "validation=null")
    found = re.findall(r"training waited ([\d.]+) s, the rest took ([\d.]+) s", small.log())
    stalls = [float(stall) for stall, _ in found]
    assert len(stalls) == 2, small.log()
    step = min(r["step_seconds"] for r in small.run.read_metrics() if "step_seconds" in r)
    state_bytes = 3 * 4 * count_parameters(small.experiment(model).model_config_resolved())
    bound = step + state_bytes / COPY_BYTES_PER_SECOND + 0.05
    print(f"step {step:.3f} s, saves stalled {stalls} s, bound {bound:.3f} s")
    assert stalls[1] < bound


def scored(model: Transformer, questions: list[list[Request]], device: str, precision: Precision = "fp32") -> list:
    """Log-probability per token of each request, and whether all its tokens are the likeliest."""
    scores = score_questions(NativeModel(lambda: model, device=device, precision=precision), questions)
    return [(s.sum_logprob / s.num_tokens, s.all_argmax) for question in scores for s in question]


@pytest.fixture(scope="module")
def asked() -> tuple[Transformer, list[list[Request]]]:
    """A model that has learned to count, so that it is sure of some tokens, and questions of several options."""
    generator = torch.Generator().manual_seed(5)

    def counting(rows: int, length: int) -> torch.Tensor:
        first = torch.randint(0, CONFIG.vocab_size, (rows, 1), generator=generator)
        return (first + torch.arange(length)) % CONFIG.vocab_size

    torch.manual_seed(0)
    model = create_model(CONFIG)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(30):
        ids = counting(16, 33)
        F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
    texts = counting(40, 40).tolist()
    wrong = torch.randint(0, CONFIG.vocab_size, (40, 8), generator=generator).tolist()
    questions = []
    for n, (text, other) in enumerate(zip(texts, wrong)):
        cut = 4 + n % 25
        context = tuple(text[:cut])
        questions.append([Request(context, tuple(text[cut : cut + 1 + n % 6])), Request(context, tuple(other))])
    return model, questions


def largest_difference(here: list, there: list) -> float:
    return max(abs(a - b) for (a, _), (b, _) in zip(here, there, strict=True))


def test_scores_in_fp32_are_those_of_a_cpu(asked: tuple[Transformer, list[list[Request]]]):
    """Within 1e-4 nats a token."""
    model, questions = asked
    there = scored(model, questions, "cpu")
    here = scored(model, questions, DEVICE)
    assert largest_difference(here, there) < 1e-4
    assert [hit for _, hit in here] == [hit for _, hit in there]
    assert {hit for _, hit in here} == {True, False}


@pytest.fixture
def tf32():
    """Matrix products of fp32 tensors in TF32, where there is such a thing."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision(before)


def test_scores_in_tf32_are_near_to_those_of_a_cpu(asked: tuple[Transformer, list[list[Request]]], tf32: None):
    """Within 0.01 nats a token; TF32 keeps 10 bits of a product's factors."""
    model, questions = asked
    there = scored(model, questions, "cpu")
    assert largest_difference(scored(model, questions, DEVICE), there) < 0.01


def test_scores_in_bf16_are_near_to_those_of_a_cpu_in_fp32(asked: tuple[Transformer, list[list[Request]]]):
    """Within 0.05 nats a token; bf16 keeps 7 bits, and a CPU is off by 0.014."""
    model, questions = asked
    there = scored(model, questions, "cpu")
    here = scored(model, questions, DEVICE, "bf16")
    assert 0 < largest_difference(here, there) < 0.05


def test_the_gpu_benchmark_measures_without_a_failure_or_a_wait_for_the_device(tmp_path: Path):
    command = [sys.executable, "benchmarks/gpu.py", "--tiny", "--only", "160m", "7b", "--out", str(tmp_path)]
    subprocess.run(command, cwd=REPOSITORY, check=True)
    found = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert not [line for line in found if line["what"] == "failed"]
    measured = [line for line in found if line["what"] == "speed"]
    assert len(measured) >= 6
    assert not [line for line in measured if line["host_syncs"]]
