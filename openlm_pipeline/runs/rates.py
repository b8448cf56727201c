"""The learning rate of each step of a recipe, and what is odd about it: a jump, a climb, tokens at rate 0."""

from collections.abc import Iterator, Sequence

from openlm_pipeline.experiments import Experiment
from openlm_pipeline.result import Finding, refusal
from openlm_pipeline.runs.folder import RunFolder
from openlm_pipeline.storage.home import Home
from openlm_pipeline.units import format_tokens

JUMP = 1.05
"""A rate of so many times the one before it is a jump where a fork begins."""
_POINTS = 2000
_BARS = " ▁▂▃▄▅▆▇█"


def rate_curve(experiment: Experiment, until: int) -> list[tuple[int, float]]:
    """(step, its rate) of at most `_POINTS` steps from the first to the last up to `until` tokens."""
    start, end = (experiment.steps(tokens) for tokens in (experiment.start_tokens(), until))
    rate, count = experiment.learning_rates(experiment.start_tokens()), end - start
    points = sorted({start + i * (count - 1) // max(1, _POINTS - 1) for i in range(_POINTS)}) if count > 0 else []
    return [(step, rate(step)) for step in points]


def parent_rate(experiment: Experiment, home: Home) -> float | None:
    """The rate of the step that the parent of a fork made, or would make, after the milestone: the fork's first, if
    nothing were changed. None where the parent has not begun, or the fork warms up anew."""
    if experiment.parent is None or (experiment.schedule_start() and experiment.training.warmup):
        return None
    run = RunFolder(home.run(experiment.parent.run, experiment.parent.version))
    if not run.experiment_file.exists():
        return None
    parent = run.experiment()
    return parent.learning_rates(parent.start_tokens())(parent.steps(experiment.parent.milestone))


def rate_findings(experiment: Experiment, home: Home, until: int) -> Iterator[Finding]:
    """What the learning rate does that nobody would want without knowing it, up to `until` tokens."""
    curve, training, batch = rate_curve(experiment, until), experiment.training, experiment.training.global_batch
    if not curve:
        return
    first, parent = curve[0], parent_rate(experiment, home)
    if parent is not None and first[1] > JUMP * parent:
        yield refusal(
            "rate",
            f"the learning rate of {experiment.name} jumps from {parent:.3g}, the parent's, to {first[1]:.3g}",
            f"Set training.lr={parent:.3g} to continue from the parent's, or parent.schedule=restart with a warm-up",
        )
    elif parent is not None and first[1] * JUMP < parent:
        yield Finding("warning", f"the learning rate falls from {parent:.3g}, the parent's, to {first[1]:.3g}")
    warm = [
        (step, rate) for step, rate in curve if step >= experiment.steps(experiment.schedule_start() + training.warmup)
    ]
    climbs = [(a, b) for a, b in zip(warm, warm[1:]) if b[1] > a[1]]
    if climbs or (warm and warm[0][1] > training.lr):
        high = max(rate for _, rate in warm)
        yield refusal(
            "rate",
            f"the learning rate of {experiment.name} climbs after its warm-up, to {high:.3g} where training.lr is "
            f"{training.lr:.3g}",
            "Lower training.lr_min or training.lr_floor",
        )
    zero = sum(rate == 0 for _, rate in curve) / len(curve) * len(range(curve[0][0], curve[-1][0] + 1)) * batch
    if zero:
        horizon = experiment.schedule_horizon()
        ends = f", as its schedule ends at {format_tokens(horizon)}" if horizon is not None else ""
        yield refusal(
            "rate",
            f"{experiment.name} would train about {format_tokens(round(zero), 3)} tokens at a learning rate of 0{ends}",
            "Set training.horizon to the last milestone, or training.lr_min or training.lr_floor above 0",
        )
    if training.decay and training.schedule == "wsd":
        begins = experiment.schedule_horizon() - training.decay
        if begins >= until == experiment.milestones[-1]:
            yield Finding(
                "warning",
                f"the decay of {experiment.name} begins at {format_tokens(begins)} tokens, after its last milestone",
                "Set training.horizon, or another last milestone",
            )


def rate_line(experiment: Experiment, width: int = 40) -> str:
    """The learning rate from the first step to the last, drawn."""
    curve = rate_curve(experiment, experiment.milestones[-1])
    rates = [curve[i * (len(curve) - 1) // (width - 1)][1] for i in range(width)]
    return f"learning rate: {rates[0]:.3g} |{drawn(rates, 0)}| {rates[-1]:.3g}, at most {max(rates):.3g}"


def drawn(values: Sequence[float], low: float) -> str:
    """A bar for each value, from none at `low` to a full one at the highest."""
    height = (max(values) - low) or 1
    return "".join(_BARS[round((value - low) / height * (len(_BARS) - 1))] for value in values)
