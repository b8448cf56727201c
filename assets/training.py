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
    made_from,
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
from openlm_pipeline.runs.launch import MilestoneReached, MilestoneReused, StepSkipped
from openlm_pipeline.storage.home import Home
from openlm_pipeline.units import format_tokens, milestone_label

_OBSERVATIONS, _GROWTH, _OBSERVE_SECONDS = 200, 0.2, 5.0
"""Observations of a run: their number at even distances, how the distance grows until then, and the least one."""
_SKIPPED_TOLD = 50
"""Steps left out that have a line of their own. Dagster keeps every event and line for good."""
_PICTURE_POINTS = 120
_PICTURE_INCHES = 4.4
"""Its letters are read in a dialog of Dagster, which is narrow."""
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
        import openlm_pipeline.reports.plots  # noqa: F401 - a second, which the first milestone would come later

        home = Home.from_env()
        selected = {label for label in labels if checkpoint_key(run, label) in context.selected_asset_keys}
        until = max(labels[label] for label in selected)
        folder = RunFolder(home.run(run, experiment.version))
        distances, skipped = _Distances(until), 0
        with user_errors():
            for event in run_end.closes(
                stages.train(experiment, home, until, context.log.info, allow=allowed(context))
            ):
                if isinstance(event, MilestoneReached):
                    yield from _milestone(context, experiment, folder, event, event.label in selected)
                elif isinstance(event, StepSkipped):
                    skipped += 1
                    if skipped <= _SKIPPED_TOLD:  # further ones are counted in the observations
                        context.log.warning(f"step {event.record['step']} left out: {event.record['skipped']}")
                elif distances.due(event.record["tokens"], time.monotonic()):
                    _observe(context, experiment, folder, skipped)

    return train


class _Distances:
    """When a run is observed: soon at first, then at growing distances, about `_OBSERVATIONS` times over all tokens."""

    def __init__(self, until: int) -> None:
        self._longest = until / _OBSERVATIONS
        self._first = self._last = 0
        self._at = -math.inf

    def due(self, tokens: int, now: float) -> bool:
        """Whether to observe at so many tokens and seconds; then the next is due later."""
        gap = min(self._longest, _GROWTH * (self._last - self._first))
        if now - self._at < _OBSERVE_SECONDS or tokens < self._last + gap:
            return False
        self._first, self._last, self._at = self._first or tokens, tokens, now
        return True


def _standing(experiment: Experiment, records: list[dict[str, Any]]) -> dict[str, Any]:
    """What people ask of a run first: its losses, in numbers and as a picture against tokens."""
    from openlm_pipeline.reports.plots import loss_chart  # matplotlib is slow to import
    from openlm_pipeline.reports.svg import markdown_image

    training, validated = ([r for r in records if kind in r] for kind in ("loss", "validation_loss"))
    facts = {k: of[-1][k] for k, of in (("loss", training), ("validation_loss", validated)) if of}
    tokens = records[-1]["tokens"]
    reached = [t for _, t in experiment.labelled_milestones() if t <= tokens]
    picture = markdown_image(loss_chart(records, reached, _PICTURE_POINTS, _PICTURE_INCHES), "loss against tokens")
    return {**facts, "loss_curve": dg.MetadataValue.md(picture), "tokens": tokens}


def _observe(context: dg.AssetExecutionContext, experiment: Experiment, folder: RunFolder, skipped: int) -> None:
    """Loss and speed on the milestone that is being trained, while it is; the description is the terminal's line."""
    if not (records := folder.read_metrics()):
        return
    facts = _standing(experiment, records) | {"skipped_steps": skipped}
    ahead = [label for label, tokens in experiment.labelled_milestones() if tokens >= facts["tokens"]]
    label = ahead[0] if ahead else [name for name, _ in experiment.labelled_milestones()][-1]
    latest = next((r for r in reversed(records) if "loss" in r), {})
    facts |= {k: v for k, v in latest.items() if k not in ("time", "tokens") and not isinstance(v, dict)}
    numbers = [f"{k} {facts[k]:,.4g}" for k in ("loss", "validation_loss", "tokens_per_second") if k in facts]
    said = f"{format_tokens(facts['tokens'])} tokens, {', '.join(numbers)}"
    context.log_event(dg.AssetObservation(checkpoint_key(experiment.name, label), said, metadata=facts))


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
    facts = {
        **_standing(experiment, records),
        **made_from(experiment),
        **run_links(experiment),
        "tokens_per_second": training[-1]["tokens_per_second"],
        **shown(ledger.facts(folder, event.label)),
        **metadata(result),
        "records": _table(training),
    }
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
