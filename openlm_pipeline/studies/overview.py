"""What a study takes, and how far it is."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from openlm_pipeline.checkpoints.folders import Checkpoint
from openlm_pipeline.pipeline.overview import scores, state_of
from openlm_pipeline.runs.dry_run import describe
from openlm_pipeline.runs.folder import RunFolder
from openlm_pipeline.storage.home import Home
from openlm_pipeline.studies.study import Study, StudyRun
from openlm_pipeline.units import format_tokens


@dataclass(frozen=True)
class RunCost:
    """A run of a study: what all of it takes, and what is done."""

    run: StudyRun
    tokens: int
    """That it trains, without those of its trunk."""
    tokens_done: int
    gpu_hours: float | None
    """All of it; None where no device is named."""

    @property
    def gpu_hours_left(self) -> float | None:
        return self.gpu_hours and self.gpu_hours * (1 - self.tokens_done / self.tokens)


@dataclass(frozen=True)
class StudyPlan:
    """The runs of a study with their costs."""

    study: Study
    runs: tuple[RunCost, ...]
    tokens_apart: int
    """What the same points take as runs of their own, without shared trunks."""
    price: float | None = None
    """Of a GPU-hour."""

    @property
    def tokens(self) -> int:
        return sum(cost.tokens for cost in self.runs)

    @property
    def gpu_hours(self) -> float | None:
        """Of what is left to train."""
        left = [cost.gpu_hours_left for cost in self.runs]
        return None if None in left else sum(left)

    def lines(self) -> Iterator[str]:
        """For people."""
        width = max(len(cost.run.name) for cost in self.runs)
        yield f"{'run':{width}}{'parameters':>13}{'from':>9}{'to':>9}{'trains':>9}{'done':>6}{'GPU-hours':>11}"
        for cost in self.runs:
            experiment = cost.run.experiment
            hours = "-" if cost.gpu_hours is None else f"{cost.gpu_hours:,.3g}"
            yield (
                f"{cost.run.name:{width}}{format_tokens(cost.run.parameters, 3):>13}"
                f"{format_tokens(experiment.start_tokens(), 3):>9}{format_tokens(experiment.milestones[-1], 3):>9}"
                f"{format_tokens(cost.tokens, 3):>9}{cost.tokens_done / cost.tokens:>6.0%}{hours:>11}"
            )
        points = sum(cost.run.budget is not None for cost in self.runs)
        saved = 1 - self.tokens / self.tokens_apart
        yield (
            f"{points} points from {len(self.runs)} runs, {format_tokens(self.tokens, 4)} tokens: as runs of their own "
            f"they were {format_tokens(self.tokens_apart, 4)}, {saved:.0%} of which are saved"
        )
        if (hours := self.gpu_hours) is not None:
            money = f", {hours * self.price:,.2f} at the price given" if self.price is not None else ""
            budget = self.study.budget_gpu_hours
            over = f"; over the budget of {budget:g}" if budget is not None and hours > budget else ""
            yield f"left to train: {hours:,.4g} GPU-hours{money}{over}"


def plan_study(
    study: Study, runs: Sequence[StudyRun], home: Home, device: str | None, mfu: float, price: float | None
) -> StudyPlan:
    """What the runs of a study take.

    Args:
        device: a GPU such as `H100`, for the time; without it none is told.

    Raises:
        ConfigError: no such GPU.
    """
    costs: dict[str, RunCost] = {}
    apart = 0
    for run in runs:
        experiment = run.experiment
        if run.budget is not None:
            apart += run.budget
        if run.name in costs:  # another budget of the same run
            continue
        told = describe(experiment, experiment.launcher.world_size, device, mfu, home)
        hours = told.seconds * told.processes / 3600 if told.seconds is not None else None
        trained = _trained(_folder(run, home).saved())
        done = min(told.tokens, max(0, trained - experiment.start_tokens()))
        costs[run.name] = RunCost(run, told.tokens, done, hours)
    return StudyPlan(study, tuple(costs.values()), apart, price)


def _folder(run: StudyRun, home: Home) -> RunFolder:
    return RunFolder(home.run(run.name, run.experiment.version))


def _trained(saved: Sequence[Checkpoint]) -> int:
    return max((checkpoint.tokens for checkpoint in saved), default=0)


def status_lines(runs: Sequence[StudyRun], home: Home) -> Iterator[str]:
    """How far each run is: state, tokens, held-out loss and score of its point."""
    width = max(len(run.name) for run in runs)
    yield f"{'run':{width}}  {'state':10}{'tokens':>16}{'loss':>9}{'score':>8}"
    done = 0
    points = [run for run in runs if run.budget is not None]
    for run in runs:
        folder = _folder(run, home)
        saved = folder.saved()
        state = state_of(run.experiment, home, folder)[0] if folder.path.exists() else "not begun"
        tokens = f"{format_tokens(_trained(saved), 3)}/{format_tokens(run.experiment.milestones[-1], 3)}"
        loss = score = "-"
        if run.budget is not None:
            found = [c for c in saved if c.milestone == run.label]
            if found and "validation_loss" in found[0].metrics:
                done, loss = done + 1, f"{found[0].metrics['validation_loss']:.4f}"
            if (average := scores(home, folder, run.label)) and average["value"] is not None:
                score = f"{average['value']:.3f}"
        yield f"{run.name:{width}}  {state:10}{tokens:>16}{loss:>9}{score:>8}"
    yield f"{done} of {len(points)} points are there"
