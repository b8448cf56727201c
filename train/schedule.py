"""Learning-rate schedules as functions of tokens, so that they do not depend on the batch size."""

import math

from openlm_pipeline.experiments.spec import Training


def learning_rate(training: Training, horizon: int | None, step: int) -> float:
    """Learning rate of optimizer step `step`, counted from 0 where the schedule begins, as are the `horizon`'s tokens.

    Warm-up is linear and reaches `lr` with its last step, then: `cosine` falls to `lr_min` at the horizon (OpenLM's
    formula), `wsd` stays and falls to `lr_min` over the last `decay` tokens, as (steps left / decay steps) to the
    `decay_power`, `constant` stays. After the warm-up there is never less than `lr_floor`.
    """
    warmup_steps = -(-training.warmup // training.global_batch)
    if step < warmup_steps:
        return training.lr * (step + 1) / warmup_steps
    return max(training.lr_floor, _after_warmup(training, horizon, step, warmup_steps))


def _after_warmup(training: Training, horizon: int | None, step: int, warmup_steps: int) -> float:
    if training.schedule == "constant":
        return training.lr
    total_steps = -(-horizon // training.global_batch)
    if training.schedule == "cosine":
        progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
        return training.lr_min + (training.lr - training.lr_min) * (1 + math.cos(math.pi * progress)) / 2
    decay_steps = -(-training.decay // training.global_batch)
    left = max(0, total_steps - step)
    if left >= decay_steps:
        return training.lr
    return training.lr_min + (training.lr - training.lr_min) * (left / decay_steps) ** training.decay_power
