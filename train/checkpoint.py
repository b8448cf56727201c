"""Sharded saving and loading of model and optimizer with torch's distributed checkpoint (DCP)."""

import shutil
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.optim import Optimizer

from openlm_pipeline.files import write_json
from openlm_pipeline.models.transformer import Transformer
from openlm_pipeline.runs.checkpoints import MODEL_CONFIG, Checkpoint, commit, folder_name
from openlm_pipeline.runs.weights import SafePlanner, SafeReader
from train.distributed import World


def _state(model: Transformer, optimizer: Optimizer) -> dict[str, object]:
    model_state, optimizer_state = get_state_dict(model, optimizer)
    return {"model": model_state, "optimizer": optimizer_state}


def save(
    folder: Path,
    model: Transformer,
    optimizer: Optimizer,
    world: World,
    *,
    run_fingerprint: str,
    step: int,
    tokens: int,
    milestone: str | None,
    metrics: dict[str, float],
) -> Checkpoint:
    """Save under a temporary name and commit; every rank returns when the checkpoint is complete."""
    tmp = folder / f".tmp-{folder_name(step)}"

    def remove_unfinished() -> None:  # of this step, or of another where a process was killed while saving
        for left in folder.glob(".tmp-step-*"):
            shutil.rmtree(left)

    world.from_rank0(remove_unfinished)
    dcp.save(_state(model, optimizer), checkpoint_id=tmp)

    def finish() -> Checkpoint:
        write_json(tmp / MODEL_CONFIG, model.config.model_dump())
        return commit(tmp, run_fingerprint, step, tokens, milestone, metrics)

    return world.from_rank0(finish)


def load(checkpoint: Checkpoint, model: Transformer, optimizer: Optimizer) -> None:
    """Load a verified checkpoint into model and optimizer, whatever the world size it was saved at."""
    state = _state(model, optimizer)
    dcp.load(state, storage_reader=SafeReader(checkpoint.path), planner=SafePlanner())
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])


def make_optimizer(experiment, model: Transformer) -> Optimizer:
    """AdamW as OpenLM has it: decoupled weight decay on every parameter."""
    t = experiment.training
    return torch.optim.AdamW(
        model.parameters(), lr=t.lr, betas=(t.beta1, t.beta2), eps=t.eps, weight_decay=t.weight_decay, fused=True
    )
