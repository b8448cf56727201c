"""The runs of a home: which there are, what state each is in, how far and how good it is. Only looks."""

from pathlib import Path
from typing import Any

from openlm_pipeline.errors import MissingInputError, OpenLMError, nearest
from openlm_pipeline.experiments import Experiment
from openlm_pipeline.pipeline.evaluation import CARD
from openlm_pipeline.runs import ledger
from openlm_pipeline.runs.folder import RunFolder
from openlm_pipeline.runs.launch import launcher_of
from openlm_pipeline.storage.files import is_held, is_set_aside
from openlm_pipeline.storage.home import Home

ALIVE = ("running", "queued")


def run_folders(home: Home, superseded: bool = True) -> list[RunFolder]:
    """All run folders by name and version; those that were set aside only if wanted."""
    found = sorted(path.parent for path in (home.root / "runs").glob("*/*/run.json"))
    return [RunFolder(path) for path in found if superseded or not is_set_aside(path)]


def find_run(home: Home, name: str, version: str | None = None) -> RunFolder:
    """The folder of the run `NAME` or `NAME/VERSION`; without a version the one that was written to last.

    Raises:
        MissingInputError: there is none; the message names the nearest.
    """
    name, _, of_name = name.partition("/")
    version, known = version or of_name, run_folders(home)
    if not (runs := [run for run in known if run.path.parent.name == name]):
        names = sorted({run.path.parent.name for run in known})
        raise MissingInputError(f"there is no run {name!r} in {home.root / 'runs'}; {nearest(name, names)}")
    if not version:
        return max(runs, key=lambda run: (not is_set_aside(run.path), _written(run)))
    if not (runs := {run.path.name: run for run in runs}).get(version):
        raise MissingInputError(f"run {name} has no version {version!r}; it has {', '.join(runs)}")
    return runs[version]


def _written(run: RunFolder) -> float:
    return max(path.stat().st_mtime for path in (run.path / "run.json", run.metrics_file) if path.exists())


def experiment_of(run: RunFolder) -> Experiment:
    """The resolved experiment of a run.

    Raises:
        OpenLMError: the folder does not say what it is.
    """
    _ = run.identity  # says so where it is damaged
    return run.experiment()


def state_of(experiment: Experiment, home: Home, run: RunFolder) -> tuple[str, str]:
    """What a run does or how it ended (`running`, `queued`, `completed`, `preempted`, `failed`; `stopped` where its
    process is gone without a word; `not begun`), and why."""
    if is_held(run.lock_folder):
        return "running", ""
    said: list[str] = []
    try:
        if launcher_of(experiment, home, run, said.append).find() is not None:
            return "queued", said[-1]
    except OpenLMError as e:
        said.append(f"its cluster can't be asked: {e}")
    if is_held(run.path / "launch"):
        return "running", "its trainer is starting"
    last = run.read_ledger()[-1:]
    if outcome := run.read_outcome() or next((event for event in last if event["event"] == "end"), None):
        return outcome["status"], "; ".join([*([outcome["reason"]] if "reason" in outcome else []), *said])
    if run.has_begun or run.ledger_file.exists():
        return "stopped", "; ".join(["its process is gone without a word, as after a kill", *said])
    return "not begun", "; ".join(said)


def scores(home: Home, run: RunFolder, label: str) -> dict[str, Any] | None:
    """The headline of a milestone with its interval; None where it is not scored."""
    from openlm_pipeline.evaluation.scorecard import load_scorecard

    card = home.scorecard(run.path.parent.name, run.path.name, label) / CARD
    if not card.exists():
        return None
    average = load_scorecard(card).headline
    return average.model_dump(include={"name", "value", "ci_low", "ci_high", "status"})


def summary(home: Home, run: RunFolder) -> dict[str, Any]:
    """A run as one row: where it stands, how good it is, what it took. Of a damaged one what is wrong."""
    row: dict[str, Any] = {"run": run.path.parent.name, "version": run.path.name, "folder": str(run.path)}
    try:
        experiment = experiment_of(run)
        state, why = state_of(experiment, home, run)
        milestones = [c for c in run.saved() if c.milestone]
        scored = [s for c in reversed(milestones) if (s := scores(home, run, c.milestone))]
        time, records = ledger.facts(run), [r for r in run.last_records() if "loss" in r]
    except OpenLMError as e:
        return row | {"state": "damaged", "why": str(e)}
    return row | {
        "state": state,
        "why": why,
        "tokens": records[-1]["tokens"] if records else 0,
        "target_tokens": experiment.milestones[-1],
        "milestone": milestones[-1].milestone if milestones else None,
        "loss": records[-1]["loss"] if records else None,
        "score": scored[0] if scored else None,
        "time": time,
    }


def log_file(run: RunFolder) -> Path | None:
    """The newest file that a trainer of the run printed to."""
    logs = [*run.path.glob("*.log"), *run.path.glob("launch/*.log")]
    return max(logs, key=lambda path: path.stat().st_mtime, default=None)
