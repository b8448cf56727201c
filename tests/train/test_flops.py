"""Operations a token and peaks of devices: the published numbers, and names that only look alike."""

import re

import pytest

from openlm_pipeline.models import find_config
from openlm_pipeline.runs.estimates import DEVICES, find_device, flops_per_token, matmul_parameters, peak_flops

GIGAFLOPS_PER_TOKEN = {  # at 2048 tokens a sample
    "open_lm_160m": "0.97",
    "open_lm_411m": "2.76",
    "open_lm_830m": "5.45",
    "open_lm_1b": "9.23",
    "open_lm_3b": "18.0",
    "open_lm_7b": "43.3",
}


@pytest.mark.parametrize("name", GIGAFLOPS_PER_TOKEN)
def test_operations_a_token_are_those_of_the_published_tables(name: str):
    expected = GIGAFLOPS_PER_TOKEN[name]
    digits = len(expected.split(".")[1])
    assert f"{flops_per_token(find_config(name), 2048) / 1e9:.{digits}f}" == expected


@pytest.mark.parametrize(
    "overrides", [{}, {"ffn": "gelu"}, {"ffn": "gemma_geglu"}, {"weight_tying": True}, {"qk_norm": True}]
)
@pytest.mark.parametrize("name", ["open_lm_11m", "open_lm_87m"])
def test_matrix_weights_are_the_matrices_of_the_model_without_the_embedding(name: str, overrides: dict):
    from openlm_pipeline.models import create_model

    model = create_model(name, device="meta", **overrides)
    matrices = {id(p): p.numel() for n, p in model.named_parameters() if p.dim() == 2}
    embedding = 0 if overrides.get("weight_tying") else model.tok_embeddings.weight.numel()
    assert matmul_parameters(model.config) == sum(matrices.values()) - embedding


NAMES = {
    "NVIDIA H100 80GB HBM3": "H100 SXM",
    "NVIDIA H100 SXM5 80GB": "H100 SXM",
    "NVIDIA H100 PCIe": "H100 PCIe",
    "NVIDIA H100 NVL": "H100 NVL",
    "H100": "H100 SXM",
    "NVIDIA H200": "H200 SXM",
    "NVIDIA H200 NVL": "H200 NVL",
    "NVIDIA GH200 480GB": "GH200",
    "NVIDIA A100-SXM4-40GB": "A100",
    "NVIDIA A100-SXM4-80GB": "A100",
    "A100-SXM4-40GB": "A100",
    "NVIDIA A100-PCIE-40GB": "A100",
    "NVIDIA A100 80GB PCIe": "A100",
    "NVIDIA A10G": "A10G",
    "NVIDIA A10": "A10",
    "NVIDIA L4": "L4",
    "NVIDIA L40": "L40",
    "NVIDIA L40S": "L40S",
    "NVIDIA GeForce RTX 4090": "RTX 4090",
    "NVIDIA GeForce RTX 3090": "RTX 3090",
    "Tesla V100-SXM2-16GB": "V100 SXM2",
    "Tesla V100-SXM3-32GB": "V100 SXM2",
    "Tesla V100-PCIE-32GB": "V100 PCIe",
    "Tesla T4": "T4",
    "NVIDIA B200": "B200",
    "NVIDIA GB200": "GB200",
    "AMD Instinct MI300X": "MI300X",
    "AMD Instinct MI300X OAM": "MI300X",
    "amd instinct  mi300x": "MI300X",
}
OTHERS = [
    "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
    "NVIDIA GeForce RTX 4090 Laptop GPU",
    "NVIDIA GeForce RTX 4090 D",
    "NVIDIA GeForce RTX 3090 Ti",
    "NVIDIA A1000",
    "NVIDIA A100X",
    "NVIDIA RTX A4000",
    "NVIDIA T400",
    "NVIDIA T4G",
    "NVIDIA L20",
    "NVIDIA B2000",
    "NVIDIA H20",
    "AMD Instinct MI300A",
    "AMD Instinct MI250X",
    "cpu",
    "",
]


@pytest.mark.parametrize("name", NAMES)
def test_a_device_is_known_by_what_torch_calls_it(name: str):
    assert find_device(name).name == NAMES[name]


@pytest.mark.parametrize("name", OTHERS)
def test_a_device_with_a_like_name_is_not_taken_for_one(name: str):
    assert find_device(name) is None
    assert peak_flops(name, "bf16") is None


def test_each_device_is_known_by_its_name_in_the_table_and_by_one_pattern():
    for device in DEVICES:
        assert [d for d in DEVICES if re.fullmatch(d.pattern, device.name.lower())] == [device]


PUBLISHED = {  # dense TFLOP/s in bf16 and fp32, data sheets of the makers
    "H100 SXM": (989.4, 66.9),
    "H100 PCIe": (756.5, 51.2),
    "H100 NVL": (835.5, 60),
    "H200 SXM": (989.4, 66.9),
    "A100": (312, 19.5),
    "A10G": (70, 31.5),
    "L4": (121, 30.3),
    "L40S": (362, 91.6),
    "RTX 4090": (165.2, 82.6),
    "RTX 3090": (71, 35.6),
    "V100 SXM2": (None, 15.7),
    "T4": (None, 8.1),
    "B200": (2250, 75),
    "MI300X": (1307.4, 163.4),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_peaks_are_the_dense_ones_not_those_of_sparse_matrices(name: str):
    bf16, fp32 = PUBLISHED[name]
    assert peak_flops(name, "bf16") == (bf16 * 1e12 if bf16 else None)
    assert peak_flops(name, "fp32") == fp32 * 1e12


def test_tf32_is_half_of_bf16_where_there_are_tensor_cores():
    for device in DEVICES:
        if device.bf16 is None:
            assert device.tf32 is None
        else:
            assert device.tf32 == pytest.approx(device.bf16 / 2, rel=0.015)
