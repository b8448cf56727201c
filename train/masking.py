"""What a sample becomes for the model: inputs, targets, and the number of the document at each position.

The masks are OpenLM's: `mask_left` is its `--target-mask-left`, `mask_token` its `--target-mask-individual`,
`squash_mask_left` its flag of that name.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from openlm_pipeline.errors import ConfigError
from openlm_pipeline.experiments.spec import Training
from openlm_pipeline.models.transformer import IGNORE_INDEX


@dataclass(frozen=True)
class ModelInput:
    """One batch for `Transformer.forward`."""

    ids_BS: Tensor
    targets_BS: Tensor
    """-100 where nothing is predicted."""
    documents_BS: Tensor | None
    """Number of the document at each position, int64, None where documents are not told apart."""


class Masking:
    """Makes model input of samples, by the masks of a recipe."""

    def __init__(self, training: Training, eot_ids: set[int]) -> None:
        """
        Args:
            eot_ids: the end-of-text id of each dataset, used by `training.document_mask`.

        Raises:
            ConfigError: masks that contradict each other, or datasets whose documents end differently.
        """
        left, token = training.mask_left, training.mask_token
        if training.squash_mask_left and (left is None or token is None):
            raise ConfigError("training.squash_mask_left needs training.mask_left, and training.mask_token to fill up")
        if left is not None and left == token:
            raise ConfigError(f"training.mask_left and training.mask_token are both {left}; they mean different things")
        if training.document_mask and len(eot_ids) != 1:
            raise ConfigError(
                f"training.document_mask needs one end-of-text id in all datasets; there are {sorted(eot_ids)}"
            )
        self.left, self.token, self.squash = left, token, training.squash_mask_left
        self.eot_id = next(iter(eot_ids)) if training.document_mask else None

    @property
    def masks_targets(self) -> bool:
        """Whether a position may have no target, so that targets must be counted."""
        return self.left is not None or self.token is not None

    def __call__(self, samples: Tensor) -> ModelInput:
        """Samples, int64[B, seq_len + 1], to input of the same length as the model's."""
        ids_BS, targets_BS = samples[:, :-1], samples[:, 1:]
        if self.left is not None:
            is_left = targets_BS == self.left
            before_last_BS = is_left.flip(1).cumsum(1).flip(1) > 0
            if self.squash:
                keep_BS = ~is_left
                targets_BS = targets_BS.masked_fill(before_last_BS, IGNORE_INDEX)
                ids_BS = self._squash(ids_BS, ids_BS != self.left)
                targets_BS = self._squash(targets_BS, keep_BS)
            else:
                targets_BS = targets_BS.masked_fill(before_last_BS, IGNORE_INDEX)
        if self.token is not None:
            targets_BS = targets_BS.masked_fill(targets_BS == self.token, IGNORE_INDEX)
        return ModelInput(ids_BS, targets_BS, None if self.eot_id is None else document_numbers(ids_BS, self.eot_id))

    def _squash(self, x_BS: Tensor, keep_BS: Tensor) -> Tensor:
        """The kept values of each row moved to its left, the rest filled with `mask_token`."""
        order_BS = torch.argsort((~keep_BS).byte(), dim=1, stable=True)
        is_kept_BS = keep_BS.gather(1, order_BS)
        return x_BS.gather(1, order_BS).masked_fill(~is_kept_BS, self.token)


def document_numbers(ids_BS: Tensor, eot_id: int) -> Tensor:
    """The number of the document that each token belongs to, from 0 in each row; an end-of-text ends its document."""
    is_eot_BS = (ids_BS == eot_id).long()
    return is_eot_BS.cumsum(1) - is_eot_BS
