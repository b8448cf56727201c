"""What a training run is: everything that changes its weights, and nothing else."""

from openlm_pipeline.experiments import Experiment
from openlm_pipeline.fingerprint import Tree, settings_tree
from openlm_pipeline.ordering.continued import is_same_mixture, order_record
from openlm_pipeline.registry import SAMPLINGS, SCHEDULES
from openlm_pipeline.units import format_tokens

TRAINER_VERSION = 1
"""Raised when the same experiment and data would give other weights."""

_OF_SAMPLINGS = frozenset({"window_shards", "source_batch"})
"""Fields of the first release that are in the identity only where the sampling takes them. Later ones need no such
rule: at their neutral value they are in none."""


_STABILITY = {"max_skipped_steps": 0, "spike_factor": None}
"""Settings that a run may change as it goes, since each step left out stands in its metrics; in every identity these
are their values."""


def settled(identity: Tree) -> Tree:
    """A recorded identity, in which the first release has the stability settings that the recipe had."""
    training = identity["training"]
    return {**identity, "training": {**training, **{k: v for k, v in _STABILITY.items() if k in training}}}


def settings_identity(experiment: Experiment) -> Tree:
    """The part of a run's identity that stands in the recipe; milestones only extend a run, so they are not in it."""
    unused = _OF_SAMPLINGS.difference(SAMPLINGS[experiment.training.sampling].settings)
    training = {**settings_tree(experiment.training, {"horizon", "skip_steps", *unused}), **_STABILITY}
    return {
        "model": settings_tree(experiment.model_config_resolved()),
        "training": {**training, "horizon": experiment.schedule_horizon()},
        "seq_len": experiment.seq_len,
        "seed": experiment.seed,
        **({"parent": settings_tree(experiment.parent)} if experiment.parent else {}),
        "code": TRAINER_VERSION,
    }


def run_identity(experiment: Experiment, dataset_versions: dict[str, str], parent: Tree | None = None) -> Tree:
    """The whole identity.

    Args:
        dataset_versions: sha256 of the manifest of each training dataset, by name.
        parent: what is known of what the run begins with, see `runs.parent.parent_identity`.
    """
    data = [
        {"name": d.name, "weight": d.source.weight, "manifest_sha256": dataset_versions[d.name]}
        for d in experiment.training_datasets()
    ]
    settings = settings_identity(experiment)
    if experiment.parent:
        settings["parent"] |= parent
    identity = {**settings, "data": data, **((parent or {}) if not experiment.parent else {})}
    before = identity.get("parent", {}).get("order", {"before": None})
    if "before" not in before and is_same_mixture(order_record(identity, 0), before):
        del identity["parent"]["order"]  # the parent's order simply goes on
    return identity


def ends_later(old: Tree, new: Tree) -> bool:
    """Whether all that differs is that the schedule of `new` ends later."""
    before, after = (tree.get("training", {}).get("horizon") for tree in (old, new))
    if before is None or after is None or after <= before:
        return False
    return {**old, "training": {**old["training"], "horizon": after}} == new


def extension_refusal(experiment: Experiment, old: Tree, new: Tree) -> str | None:
    """Why a finished schedule is not simply longer now; None where anything else differs, or the recipe says how.

    A schedule with an end has it at the last milestone unless the recipe has a horizon, so a milestone more would
    change the learning rate of steps that were trained.
    """
    training, before = experiment.training, old.get("training", {}).get("horizon")
    if training.horizon is not None or not ends_later(old, new):
        return None
    ended, longer = format_tokens(before), format_tokens(experiment.schedule_horizon())
    schedule = SCHEDULES[training.schedule](training, before - experiment.schedule_start())
    floor = schedule.rate(schedule.total_steps)
    fork = (
        f"`openlm fork {experiment.name}@MILESTONE NAME`: a new run from one of its milestones, with a schedule of its "
    )
    unchanged = schedule.stable_until(before) or 0
    if stable := [t for t in experiment.milestones if t <= unchanged]:
        fork += f"own; the one at {format_tokens(stable[-1])} is the last before the decay"
    else:
        fork += "own; parent.schedule=restart warms up again"
    choices = [
        fork,
        f"training.horizon={longer}: train all of it again, with the longer schedule",
        "`--allow extend`: continue at the rates that the longer schedule has from here on, as OpenLM does",
    ]
    if floor > 0:
        choices.insert(0, f"training.horizon={ended}: continue at the final learning rate of {floor:g}")
    return (
        f"the {training.schedule} schedule of {experiment.name} ended at {ended} tokens; ending at {longer}, it would "
        "have had other learning rates all along. Choose:\n  " + "\n  ".join(choices)
    )
