"""Which targets count, and which documents tokens see."""

import pytest
import torch
from small_run import SmallRun

from openlm_pipeline.errors import ConfigError
from openlm_pipeline.experiments.spec import Training
from openlm_pipeline.models import ModelConfig, create_model
from train.masking import Masking, document_numbers

L, P, EOT, _ = 42, 2, 0, -100


def masking(**settings: object) -> Masking:
    return Masking(Training(global_batch=8, lr=1.0, **settings), {EOT})


@pytest.mark.parametrize(
    ("settings", "ids", "targets"),
    [
        ({}, [5, L, P, 7, L, 8], [L, P, 7, L, 8, P]),
        ({"mask_token": P}, [5, L, P, 7, L, 8], [L, _, 7, L, 8, _]),
        ({"mask_left": L}, [5, L, P, 7, L, 8], [_, _, _, _, 8, P]),  # up to and including the last L
        ({"mask_left": L, "mask_token": P}, [5, L, P, 7, L, 8], [_, _, _, _, 8, _]),
        # The L are taken out; inputs and targets each move to the left and are filled up with P, which never counts.
        ({"mask_left": L, "mask_token": P, "squash_mask_left": True}, [5, P, 7, 8, P, P], [_, _, 8, _, _, _]),
    ],
)  # fmt: skip
def test_masks_are_those_of_openlms_flags(settings: dict, ids: list[int], targets: list[int]):
    sample = torch.tensor([[5, L, P, 7, L, 8, P]])
    before = sample.clone()
    found = masking(**settings)(sample)
    assert found.ids_BS.tolist() == [ids]
    assert found.targets_BS.tolist() == [targets]
    assert torch.equal(sample, before)


def test_without_its_token_mask_left_changes_nothing():
    sample = torch.tensor([[5, 6, 7, 8], [5, L, 7, 8]])
    found = masking(mask_left=L, mask_token=P, squash_mask_left=True)(sample)
    assert found.ids_BS.tolist() == [[5, 6, 7], [5, 7, P]]
    assert found.targets_BS.tolist() == [[6, 7, 8], [7, 8, _]]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"squash_mask_left": True, "mask_left": L}, "needs training.mask_left, and training.mask_token"),
        ({"mask_left": L, "mask_token": L}, "are both 42"),
    ],
)
def test_masks_that_contradict_each_other_are_refused(settings: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        masking(**settings)


def test_documents_that_end_differently_are_refused():
    with pytest.raises(ConfigError, match=r"one end-of-text id in all datasets; there are \[0, 5\]"):
        Masking(Training(global_batch=8, lr=1.0, document_mask=True), {0, 5})


def test_an_end_of_text_belongs_to_the_document_it_ends():
    ids = torch.tensor([[5, 6, EOT, 7, EOT, EOT, 8], [EOT, 5, 5, 5, 5, 5, 5]])
    assert document_numbers(ids, EOT).tolist() == [[0, 0, 0, 1, 1, 2, 3], [0, 1, 1, 1, 1, 1, 1]]


def test_the_value_of_a_masked_target_does_not_change_the_gradient():
    """Two samples that differ in their last token only, which is masked in both: equal gradients, bitwise."""
    model = create_model(ModelConfig(hidden_dim=32, n_layers=2, n_heads=2, vocab_size=64, seq_len=8))
    sample = torch.randint(3, 40, (2, 9))
    gradients, unmasked = [], []
    for last in (50, 51):
        sample[:, -1] = last
        for found, rule in ((gradients, masking(mask_token=last)), (unmasked, masking())):
            x = rule(sample)
            ce_sum, z_sum = model(x.ids_BS, x.targets_BS)
            found.append(torch.autograd.grad(ce_sum + 1e-4 * z_sum, list(model.parameters())))
    assert all(torch.equal(a, b) for a, b in zip(*gradients))
    assert not all(torch.equal(a, b) for a, b in zip(*unmasked))


def test_logits_of_a_document_do_not_depend_on_what_stands_before_it():
    model = create_model(ModelConfig(hidden_dim=32, n_layers=2, n_heads=2, vocab_size=64, seq_len=16))
    document = torch.randint(1, 64, (1, 9))
    samples = [torch.cat([torch.tensor([before]), document], dim=1) for before in ([3, 4, 5, EOT], [EOT, 9, 9, EOT])]
    apart, seen = (
        [m(s) for s in samples] for m in (masking(document_mask=True), masking())
    )  # fmt: skip
    with torch.no_grad():
        first, second = (model(x.ids_BS, documents_BS=x.documents_BS)[:, 4:] for x in apart)
        assert torch.equal(first, second)
        first, second = (model(x.ids_BS, documents_BS=x.documents_BS)[:, 4:] for x in seen)
        assert not torch.allclose(first, second)


MASKS = ["training.mask_token=7", "training.document_mask=true"]


@pytest.mark.parametrize("overrides", [["execution.micro_batch=2"], ["execution.micro_batch=1"]])
def test_a_masked_loss_is_the_mean_over_all_targets_of_the_batch(small: SmallRun, tmp_path, overrides: list[str]):
    """However unevenly the masked targets lie in the micro-batches, a step is the same."""
    other = SmallRun(tmp_path / "other", (4, 8))
    small.train(*MASKS)
    other.train(*MASKS, *overrides)
    assert other.losses() == pytest.approx(small.losses(), rel=1e-6)
