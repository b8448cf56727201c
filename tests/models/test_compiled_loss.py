"""The compiled loss is the loss."""

import pytest
import torch

from openlm_pipeline.models.transformer import chunk_loss_sums


@pytest.mark.drill  # a C++ compiler, twice
def test_code_generated_for_the_loss_gives_the_same_loss_and_gradients():
    torch.manual_seed(0)
    weight_VD = torch.randn(100, 16, requires_grad=True)
    x_ND, targets_N = torch.randn(24, 16), torch.randint(0, 100, (24,))
    targets_N[::5] = -100
    results = []
    for chunk_loss in (chunk_loss_sums, torch.compile(chunk_loss_sums, fullgraph=True)):
        ce_sum, z_sum = chunk_loss(x_ND, weight_VD, targets_N, True)
        (gradient,) = torch.autograd.grad(ce_sum + 1e-4 * z_sum, weight_VD)
        results.append([ce_sum.item(), z_sum.item(), *gradient.flatten().tolist()])
    assert results[1][:2] == pytest.approx(results[0][:2], rel=1e-6)
    assert results[1] == pytest.approx(results[0], rel=1e-5, abs=1e-6)
