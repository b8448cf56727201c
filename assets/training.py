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
    owned_by,
    shards_key,
    shown,
    user_errors,
)
from openlm_pipeline.experiments import Experiment
from openlm_pipeline.pipeline import training as stages
from openlm_pipeline.runs.estimates import flops_per_token
from openlm_pipeline.runs.folder import RunFolder
from openlm_pipeline.runs.identity import settings_identity
from openlm_pipeline.runs.launch import MilestoneReached, MilestoneReused, StepSkipped
from openlm_pipeline.runs.ledger import History
from openlm_pipeline.storage.home import Home
from openlm_pipeline.units import format_tokens, milestone_label

_OBSERVATIONS, _MOST_OBSERVATIONS, _GROWTH, _OBSERVE_SECONDS = 500, 700, 0.2, 5.0
"""Observations of a run that is not set back (20 minutes apart in one of a week) and of any; how the distance grows
until they are even; the least distance."""
_SKIPPED_TOLD = 50
"""Steps left out that have a line of their own. Dagster keeps every event and line for good."""
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
                group_name=experiment.group,
                kinds={"pytorch", "checkpoint"},
                owners=owned_by(),
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
        op_tags=_longest_first(experiment) if experiment.study else None,
        check_specs=[
            dg.AssetCheckSpec(name, asset=checkpoint_key(run, label), blocking=True, description=description)
            for label in labels
            for name, description in _CHECKS
        ],
    )
    def train(context: dg.AssetExecutionContext, run_end: RunEnd):
        import openlm_pipeline.reports.curves  # noqa: F401 - a second, which the first milestone would come later

        home = Home.from_env()
        selected = {label for label in labels if checkpoint_key(run, label) in context.selected_asset_keys}
        until = max(labels[label] for label in selected)
        folder = RunFolder(home.run(run, experiment.version))
        distances, skipped, history = _Distances(until), 0, None
        with user_errors():
            for event in run_end.closes(
                stages.train(experiment, home, until, context.log.info, allow=allowed(context))
            ):
                if isinstance(event, MilestoneReached):
                    history = _read(history, folder)
                    yield from _milestone(context, experiment, history, event, event.label in selected)
                elif isinstance(event, StepSkipped):
                    skipped += 1
                    if skipped <= _SKIPPED_TOLD:  # further ones are counted in the observations
                        context.log.warning(f"step {event.record['step']} left out: {event.record['skipped']}")
                elif distances.due(event.record["tokens"], time.monotonic()):
                    history = _read(history, folder)
                    _observe(context, experiment, history, skipped)

    return train


def _longest_first(experiment: Experiment) -> dict[str, str]:
    """The priority of a study's run grows with its cost, so that the longest does not train alone at the end."""
    tokens = experiment.milestones[-1] - experiment.start_tokens()
    flops = tokens * flops_per_token(experiment.model_config_resolved(), experiment.seq_len)
    return {"dagster/priority": str(round(100 * math.log10(flops)))}


def _read(history: History | None, folder: RunFolder) -> History:
    """The history of a run up to now, of which only what is new is read."""
    if history is None:
        return History(folder)
    history.update()
    return history


class _Distances:
    """When a run is observed: soon at first, then at growing distances up to even ones.

    What is trained again after a crash is observed again, from what is left of `_MOST_OBSERVATIONS`.
    """

    def __init__(self, until: int) -> None:
        self._until, self._left = until, _MOST_OBSERVATIONS
        self._first = self._last = 0
        self._at = -math.inf

    def due(self, tokens: int, now: float) -> bool:
        """Whether to observe at so many tokens and seconds; then the next is due later."""
        self._last = min(self._last, tokens)
        evenly = max(self._until / _OBSERVATIONS, (self._until - self._last) / max(1, self._left))
        gap = min(evenly, _GROWTH * abs(self._last - self._first))
        if not self._left or now - self._at < _OBSERVE_SECONDS or tokens < self._last + gap:
            return False
        self._first, self._last, self._at, self._left = self._first or tokens, tokens, now, self._left - 1
        return True


def _standing(records: list[dict[str, Any]]) -> dict[str, Any]:
    """What people ask of a run first: its losses, in numbers and as a picture against tokens."""
    from openlm_pipeline.reports.curves import series, small_picture  # matplotlib is slow to import

    training, validated = ([r for r in records if kind in r] for kind in ("loss", "validation_loss"))
    facts = {k: of[-1][k] for k, of in (("loss", training), ("validation_loss", validated)) if of}
    curves = (series(records, k) for k in ("loss", "validation_loss"))
    picture = small_picture("loss against tokens, that of held-out text as dots", *curves)
    speed = training[-1]["tokens_per_second"] if training else None
    picture = picture and dg.MetadataValue.md(picture)
    return {**facts, "loss_curve": picture, "tokens": records[-1]["tokens"], "tokens_per_second": speed}


def _cost(history: History) -> dict[str, Any]:
    """Of the run so far; `gpu_hours` of a milestone is of what came since the one before."""
    return {"run_gpu_hours": history.facts().get("gpu_hours")}


def _observe(context: dg.AssetExecutionContext, experiment: Experiment, history: History, skipped: int) -> None:
    """Loss and speed on the milestone that is being trained, while it is; the description is the terminal's line."""
    if not (records := history.losses.records()):
        return
    facts = {**_standing(records), **_cost(history), "skipped_steps": skipped}
    ahead = [label for label, tokens in experiment.labelled_milestones() if tokens >= facts["tokens"]]
    label = ahead[0] if ahead else [name for name, _ in experiment.labelled_milestones()][-1]
    latest = next((r for r in reversed(records) if "loss" in r), {})
    facts |= {k: v for k, v in latest.items() if k not in ("time", "tokens") and not isinstance(v, dict)}
    numbers = [f"{k} {facts[k]:,.4g}" for k in ("loss", "validation_loss", "tokens_per_second") if k in facts]
    said = f"{format_tokens(facts['tokens'])} tokens, {', '.join(numbers)}"
    context.log_event(dg.AssetObservation(checkpoint_key(experiment.name, label), said, metadata=shown(facts)))


def _milestone(
    context: dg.AssetExecutionContext,
    experiment: Experiment,
    history: History,
    event: MilestoneReached,
    selected: bool,
):
    key = checkpoint_key(experiment.name, event.label)
    reused = isinstance(event, MilestoneReused)
    result = stages.checkpoint_result(event.checkpoint, reused)
    records = [r for r in history.losses.records() if r["step"] <= event.checkpoint.step]
    training = [r for r in records if "loss" in r]
    facts = {
        **shown(_standing(records)),
        **made_from(experiment, event.label),
        **shown(_cost(history)),
        **shown(history.facts(event.label)),
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
                metadata=shown({"records": len(losses), "last_loss": training[-1]["loss"]}),
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
    return dg.MetadataValue.table([dg.TableRecord(shown({c: r[c] for c in columns})) for r in rows])
