"""The kernel of attention is the fastest one for a run's shapes on its GPU, and the same after a resume."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from small_run import SmallRun
from torch.backends import cuda

from openlm_pipeline.storage.files import read_json
from train import attention_backend
from train.attention_backend import attention_kernels, fastest_first

TIMES = {"flash": 2e-3, "efficient": 3e-3, "cudnn": 1e-3}
ON_A_GPU = SimpleNamespace(device=torch.device("cuda"), size=2, per_node=2, from_rank0=lambda make: make())


def test_the_fastest_is_first_and_stays_so_after_a_resume_on_the_same_gpu(tmp_path: Path):
    file, said = tmp_path / "attention.json", []
    order = fastest_first(file, "H100", TIMES.get, said.append)
    assert order == ["cudnn", "flash", "efficient"]
    assert fastest_first(file, "H100", lambda kernel: pytest.fail(f"{kernel} is timed again"), said.append) == order
    assert fastest_first(file, "A100", (TIMES | {"cudnn": None}).get, said.append) == ["flash", "efficient"]
    assert fastest_first(file, "T4", lambda kernel: None, said.append) == []
    assert read_json(file) == {"H100": order, "A100": ["flash", "efficient"], "T4": []}
    assert said == [
        "attention: cudnn 1.000 ms, flash 2.000 ms, efficient 3.000 ms",
        "attention: cudnn, as when the run began on H100",
        "attention: flash 2.000 ms, efficient 3.000 ms",
        "attention: no fused kernel takes it",
    ]


def test_a_kernel_that_fails_is_named_and_left_out(tmp_path: Path):
    def seconds(kernel: str) -> float:
        if kernel == "cudnn":
            raise RuntimeError("no valid execution plans")
        return TIMES[kernel]

    said = []
    assert fastest_first(tmp_path / "attention.json", "H100", seconds, said.append) == ["flash", "efficient"]
    assert said[0] == "attention: cudnn is left out: no valid execution plans"


def test_training_on_a_gpu_has_the_order_and_the_shapes_of_a_micro_batch_are_timed(small: SmallRun, monkeypatch):
    asked = []
    monkeypatch.setattr(attention_backend, "seconds_of", lambda kernel, *how: asked.append(how) or TIMES[kernel])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "H100")
    file = small.run.path / "attention.json"
    before = torch._C._get_sdp_priority_order()
    experiment = small.experiment("execution.micro_batch=2", "training.precision=bf16")
    with attention_kernels(experiment, ON_A_GPU, file, lambda line: None):
        kernels = torch._C._get_sdp_priority_order()[:4]
        assert kernels == [int(k) for k in (torch.nn.attention.SDPBackend.CUDNN_ATTENTION, 1, 2, 0)]
    assert torch._C._get_sdp_priority_order() == before
    assert asked == [((2, 32, 2, 16), torch.bfloat16)] * 3
    assert read_json(file) == {"H100": ["cudnn", "flash", "efficient"]}


def test_deterministic_training_times_nothing_and_leaves_cudnn_out(small: SmallRun):
    file = small.run.path / "attention.json"
    with attention_kernels(small.experiment("execution.deterministic=true"), ON_A_GPU, file, pytest.fail):
        assert (cuda.cudnn_sdp_enabled(), cuda.flash_sdp_enabled(), cuda.math_sdp_enabled()) == (False, True, True)
    assert not file.exists()


def test_on_a_cpu_nothing_is_timed(small: SmallRun):
    small.train()
    assert not small.run.attention_file.exists()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_kernels_are_timed_on_a_gpu():
    generator = torch.cuda.get_rng_state()
    assert attention_backend.seconds_of("efficient", (2, 256, 4, 64), torch.float32) > 0
    assert attention_backend.seconds_of("flash", (2, 256, 4, 64), torch.float32) is None
    assert torch.equal(torch.cuda.get_rng_state(), generator)
