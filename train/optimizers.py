"""Optimizers: fused AdamW as OpenLM has it, or Muon for the blocks' matrices with AdamW for the rest.

The trainer and the checkpoints see one object, whose parts are torch's own optimizers.
"""

from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.optim import AdamW, Muon, Optimizer

from openlm_pipeline.experiments.spec import Training
from openlm_pipeline.models.init import parameter_name

_EMBEDDINGS = ("tok_embeddings.weight", "output.weight")


class Optimizers:
    """Several optimizers used as one.

    Iterating gives its parts, which is what `torch.distributed.checkpoint.state_dict` wants to save and load them.
    """

    def __init__(self, parts: list[Optimizer]) -> None:
        self.parts = parts

    def __iter__(self) -> Iterator[Optimizer]:
        return iter(self.parts)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return [group for part in self.parts for group in part.param_groups]

    def step(self) -> None:
        for part in self.parts:
            part.step()

    def zero_grad(self) -> None:
        for part in self.parts:
            part.zero_grad()


def make_optimizer(training: Training, model: nn.Module) -> Optimizers:
    """The recipe's optimizer over all parameters of `model`, each in exactly one group.

    AdamW decays every parameter but those of `training.no_decay`. Muon (https://kellerjordan.github.io/posts/muon/)
    takes every matrix inside the blocks whole, fused ones too, at a rate scaled so that AdamW's `lr` and `weight_decay`
    suit it (https://arxiv.org/abs/2502.16982).
    """
    matrices, decayed, undecayed = [], [], []
    for wrapped_name, parameter in model.named_parameters():
        name = parameter_name(wrapped_name)
        if training.optimizer == "muon" and name.startswith("layers.") and parameter.ndim == 2:
            matrices.append(parameter)
        elif ("norms" in training.no_decay and parameter.ndim == 1) or (
            "embeddings" in training.no_decay and name in _EMBEDDINGS
        ):
            undecayed.append(parameter)
        else:
            decayed.append(parameter)
    groups = [(decayed, training.weight_decay), (undecayed, 0.0)]
    adamw = AdamW(
        [{"params": params, "weight_decay": decay} for params, decay in groups if params],
        lr=training.lr,
        betas=(training.beta1, training.beta2),
        eps=training.eps,
        fused=True,
    )
    if not matrices:
        return Optimizers([adamw])
    muon = Muon(matrices, lr=training.lr, weight_decay=training.weight_decay, adjust_lr_fn="match_rms_adamw")
    return Optimizers([adamw, muon])
