"""Checkpoints: one asset per milestone, made by one subsettable step per run, live while torchrun trains."""

import math
import time
from typing import Any

import dagster as dg

from assets.common import (
    DATA_VERSION_TAG,
    TRAINING_POOL,
    RunEnd,
    allowed,
    checkpoint_key,
    code_version,
    metadata,
    run_links,
    shards_key,
    shown,
    user_errors,
)
from openlm_pipeline.experiments import Experiment
from openlm_pipeline.pipeline import training as stages
from openlm_pipeline.runs import ledger
from openlm_pipeline.runs.folder import RunFolder
from openlm_pipeline.runs.identity import settings_identity
from openlm_pipeline.runs.launch import Measured, MilestoneReached, MilestoneReused, StepSkipped
from openlm_pipeline.storage.home import Home
from openlm_pipeline.units import format_tokens, milestone_label

_OBSERVE_SECONDS = 5.0
_TABLE_ROWS = 40
_CHECKS = (
    ("finite_loss", "Every loss of training and validation up to the milestone."),
    ("integrity", "Every file of the checkpoint has its recorded sha256."),
)


def checkpoint_assets(experiment: Experiment) -> dg.AssetsDefinition:
    """All milestones of an experiment as one step that trains up to the last selected one."""
    run = experiment.name
    labels = dict(experiment.labelled_milestones())
    shards = [shards_key(d) for d in experiment.datasets()]
    version = code_version({**settings_identity(experiment), "weights": [s.weight for s in experiment.sources]})
    parent = experiment.parent
    specs, previous = [], [checkpoint_key(parent.run, milestone_label(parent.milestone))] if parent else []
    for label, tokens in labels.items():
        key = checkpoint_key(run, label)
        specs.append(
            dg.AssetSpec(
                key,
                deps=[*shards, *previous],
                skippable=True,
                group_name=run,
                kinds={"pytorch", "checkpoint"},
                code_version=version,
                metadata={"milestone_tokens": tokens},
                description=f"Weights and optimizer of {run} after {format_tokens(tokens)} tokens.",
            )
        )
        previous = [key]

    @dg.multi_asset(
        name=f"train_{run}",
        specs=specs,
        can_subset=True,
        pool=TRAINING_POOL,
        check_specs=[
            dg.AssetCheckSpec(name, asset=checkpoint_key(run, label), blocking=True, description=description)
            for label in labels
            for name, description in _CHECKS
        ],
    )
    def train(context: dg.AssetExecutionContext, run_end: RunEnd):
        home = Home.from_env()
        selected = {label for label in labels if checkpoint_key(run, label) in context.selected_asset_keys}
        until = max(labels[label] for label in selected)
        folder = RunFolder(home.run(run, experiment.version))
        observed_at = 0.0
        with user_errors():
            for event in run_end.closes(
                stages.train(experiment, home, until, context.log.info, allow=allowed(context))
            ):
                if isinstance(event, MilestoneReached):
                    yield from _milestone(context, experiment, folder, event, event.label in selected)
                elif isinstance(event, StepSkipped):
                    context.log.warning(f"step {event.record['step']} left out: {event.record['skipped']}")
                elif isinstance(event, Measured) and time.monotonic() - observed_at >= _OBSERVE_SECONDS:
                    observed_at = time.monotonic()
                    _observe(context, experiment, event.record)

    return train


def _observe(context: dg.AssetExecutionContext, experiment: Experiment, record: dict[str, Any]) -> None:
    """Loss and speed on the milestone that is being trained, while it is."""
    ahead = [label for label, tokens in experiment.labelled_milestones() if tokens >= record["tokens"]]
    label = ahead[0] if ahead else [name for name, _ in experiment.labelled_milestones()][-1]
    facts = {k: v for k, v in record.items() if k != "time" and not isinstance(v, dict)}
    context.log_event(dg.AssetObservation(checkpoint_key(experiment.name, label), metadata=facts))
    context.log.info(
        f"{format_tokens(record['tokens'])} tokens, "
        + ", ".join(f"{k} {v:,.4g}" for k, v in facts.items() if k in ("loss", "validation_loss", "tokens_per_second"))
    )


def _milestone(
    context: dg.AssetExecutionContext,
    experiment: Experiment,
    folder: RunFolder,
    event: MilestoneReached,
    selected: bool,
):
    key = checkpoint_key(experiment.name, event.label)
    reused = isinstance(event, MilestoneReused)
    result = stages.checkpoint_result(event.checkpoint, reused)
    records = [r for r in folder.read_metrics() if r["step"] <= event.checkpoint.step]
    training = [r for r in records if "loss" in r]
    facts = (
        metadata(result)
        | run_links(experiment)
        | {
            "loss": training[-1]["loss"],
            "tokens_per_second": training[-1]["tokens_per_second"],
            "loss_curve": _table(training),
        }
    )
    facts |= shown(ledger.facts(folder, event.label))
    if not selected:
        tags = {DATA_VERSION_TAG: result.version}
        context.log_event(dg.AssetMaterialization(key, metadata=facts, tags=tags))
        return
    losses = [r.get("loss", r.get("validation_loss")) for r in records]
    yield dg.MaterializeResult(
        asset_key=key,
        metadata=facts,
        data_version=dg.DataVersion(result.version),
        check_results=[
            dg.AssetCheckResult(
                asset_key=key,
                check_name="finite_loss",
                passed=all(map(math.isfinite, losses)),
                metadata={"records": len(losses), "last_loss": training[-1]["loss"]},
            ),
            dg.AssetCheckResult(
                asset_key=key,
                check_name="integrity",
                passed=reused or stages.is_intact(event.checkpoint),
                description="Sizes were compared; its hashes are, by whoever loads it." if reused else None,
                metadata={"files": len(event.checkpoint.files), "hashed": not reused},
            ),
        ],
    )


def _table(records: list[dict[str, Any]]) -> dg.MetadataValue:
    """Up to `_TABLE_ROWS` evenly spaced records, the last among them."""
    every = -(-len(records) // _TABLE_ROWS)
    rows = records[::-1][::every][::-1]
    columns = ("step", "tokens", "loss", "lr", "grad_norm", "tokens_per_second")
    return dg.MetadataValue.table([dg.TableRecord({c: r[c] for c in columns}) for r in rows])
