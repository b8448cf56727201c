"""Our own runs as points: the loss of a milestone on held-out text, and its error where it was scored."""

from collections.abc import Sequence

from openlm_pipeline.errors import ConfigError, MissingInputError
from openlm_pipeline.experiments import Experiment, load_experiment
from openlm_pipeline.result import Say
from openlm_pipeline.storage.home import Home
from openlm_pipeline.studies.laws import Point
from openlm_pipeline.studies.study import Study, StudyRun, expand, is_study, load_study


def points_there(runs: Sequence[StudyRun], home: Home) -> tuple[list[Point], list[str]]:
    """The points of a study whose runs are trained, and the names of the others."""
    points, missing = [], []
    for run in runs:
        if run.budget is None:
            continue
        try:
            points.append(point_of(run.experiment, home, run.label))
        except MissingInputError:
            missing.append(f"{run.name}@{run.label}")
    return points, missing


def study_points(study: str, home: Home, report: Say) -> list[Point]:
    """The points of a study that are there, with the run that it predicts; or of recipes, with commas between them.

    Raises:
        ConfigError: there is no such study or recipe.
        MissingInputError: the run of a recipe is not finished.
    """
    if not is_study(study):
        return points_of_recipes([name.strip() for name in study.split(",") if name.strip()], home)
    found = load_study(study)
    points, missing = points_there(expand(found), home)
    if missing:
        some = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        report(f"{len(missing)} points are not there yet, and are left out: {some}")
    return points + measured_target(found, home)


def measured_target(study: Study, home: Home) -> list[Point]:
    """The run that a study predicts, once it is there."""
    if study.predict is None or study.predict.recipe is None:
        return []
    try:
        return points_of_recipes([study.predict.recipe], home)
    except MissingInputError:
        return []


def points_of_recipes(recipes: Sequence[str], home: Home) -> list[Point]:
    """One point for each recipe, by name or path; errors as in `study_points`."""
    return [point_of(load_experiment(recipe, []), home) for recipe in recipes]


def point_of(experiment: Experiment, home: Home, label: str | None = None) -> Point:
    """A milestone of a run as a point, by default its last.

    Raises:
        ConfigError: the recipe has no held-out text.
        MissingInputError: the milestone is not there.
    """
    from openlm_pipeline.evaluation.scorecard import load_scorecard
    from openlm_pipeline.models import count_parameters
    from openlm_pipeline.pipeline.evaluation import CARD
    from openlm_pipeline.runs.folder import RunFolder
    from openlm_pipeline.runs.launch import milestone_checkpoints

    run = RunFolder(home.run(experiment.name, experiment.version))
    home.pull(run.path)
    label = label or list(experiment.labelled_milestones())[-1][0]
    checkpoint = milestone_checkpoints(experiment, run).get(label)
    if checkpoint is None:
        raise MissingInputError(
            f"milestone {label} of {experiment.name} is not in {run.checkpoints}; `openlm train {experiment.name}` "
            "makes it"
        )
    if (loss := checkpoint.metrics.get("validation_loss")) is None:
        raise ConfigError(f"{experiment.name} has no held-out loss: its recipe needs `validation`")
    card = home.scorecard(experiment.name, experiment.version, label) / CARD
    average = load_scorecard(card).average if card.exists() else None
    training = experiment.training
    return Point(
        name=experiment.name,
        parameters=count_parameters(experiment.model_config_resolved()),
        tokens=checkpoint.tokens,
        loss=loss,
        error=None if average is None else 1 - average,
        seed=experiment.seed,
        dataset="+".join(d.name for d in experiment.training_datasets()),
        model=str(experiment.model.get("name", "")),
        settings={"training.lr": training.lr, "training.global_batch": float(training.global_batch)},
    )
