"""AdamW as OpenLM has it."""

from typing import TYPE_CHECKING

from openlm_pipeline.experiments.optimizers import Named, OptimizerChoice
from openlm_pipeline.registry import OPTIMIZERS

if TYPE_CHECKING:
    from torch.optim import Optimizer


@OPTIMIZERS.register("adamw")
class FusedAdamW(OptimizerChoice):
    """AdamW, fused; it decays every parameter but those of `no_decay`."""

    settings = ("lr", "beta1", "beta2", "eps", "weight_decay", "no_decay", "state_precision")

    def build(self, named_parameters: Named) -> "list[Optimizer]":
        from torch.optim import AdamW

        t = self.training
        groups = self.decay_groups(named_parameters)
        return [AdamW(groups, lr=t.lr, betas=(t.beta1, t.beta2), eps=t.eps, fused=True)]
