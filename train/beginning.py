"""Where a run begins: at the weights of checkpoints of any kind, or at its parent's milestone."""

import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

from openlm_pipeline.checkpoints.folders import verify
from openlm_pipeline.checkpoints.loading import load_checkpoint
from openlm_pipeline.experiments import Experiment
from openlm_pipeline.models import ModelConfig
from openlm_pipeline.models.init import initialize
from openlm_pipeline.models.transformer import Transformer
from openlm_pipeline.runs.parent import initial_weights, parent_checkpoint
from openlm_pipeline.storage.home import Home
from openlm_pipeline.units import format_tokens
from train import saver as checkpoints
from train.distributed import World
from train.optimizers import Optimizers


@dataclass
class Beginning:
    """The weights that a new run begins with: given ones, its parent's, or those that are drawn by its seed."""

    experiment: Experiment
    home: Home
    world: World
    initial_weights: Mapping[Path, float] | None
    """Checkpoints, of which the sum is taken, each times its coefficient."""
    is_over: bool = False
    """Whether the weights in memory are the run's."""

    def load(
        self, model: Transformer, optimizer: Optimizers, extra: checkpoints.Extra, console: Console
    ) -> Collection[str]:
        """Load them, or draw them by the recipe's seed.

        Returns:
            Names of the states in `extra` that were loaded as well.

        Raises:
            DataError: a file of the parent is damaged.
        """
        given = self.initial_weights or self.world.from_rank0(lambda: initial_weights(self.experiment, self.home))
        if given:
            config = self.experiment.model_config_resolved()
            _load_initial_weights(model, config, given, self.world)
            console.print(f"begins with the weights of {', '.join(map(str, given))}")
            return ()
        if self.experiment.parent:
            parent = self.world.from_rank0(lambda: parent_checkpoint(self.experiment, self.home))
            self.world.from_rank0(lambda: verify(parent))
            console.print(f"begins at {parent.path} ({format_tokens(parent.tokens)} tokens)")
            if self.experiment.parent.optimizer == "reset":
                checkpoints.load_weights(parent, model)
                return ()
            return checkpoints.load(parent, model, optimizer, extra, optional=extra.keys())
        config = self.experiment.model_config_resolved()
        initialize(model, config, self.experiment.seed, threads=max(1, (os.cpu_count() or 1) // self.world.per_node))
        return ()


def _load_initial_weights(
    model: torch.nn.Module, config: ModelConfig, weights: Mapping[Path, float], world: World
) -> None:
    """Put the sum of coefficient times weights into the sharded `model`; the first process alone reads.

    Raises:
        OpenLMError: a checkpoint can't be read, or is not one of this model; on every process.
    """
    state: dict[str, torch.Tensor] = {}

    def read() -> None:
        with torch.no_grad():
            for path, coefficient in weights.items():
                loaded: Transformer = load_checkpoint(path, config=config, warn=lambda note: print(f"note: {note}"))
                # Not `state_dict`, which has what is tied twice, and torch shards it under one name alone.
                state.update(loaded.named_buffers())
                for name, value in loaded.named_parameters():
                    state[name] = value * coefficient + state.get(name, 0)

    world.from_rank0(read)
    # A checkpoint holds no frequencies that the model does not make itself.
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, strict=False)
    set_model_state_dict(model, state, options=options)
