"""`study/<name>`: the law that a study's runs follow, what it predicts, and whether that came true."""

from collections.abc import Sequence

import dagster as dg

from assets.common import checkpoint_key, metadata, owned_by, scorecard_key, study_key, user_errors, when_ready
from openlm_pipeline.experiments import Experiment
from openlm_pipeline.storage.home import Home
from openlm_pipeline.studies.study import Study, StudyRun

HELD = "prediction_held"


def study_asset(study: Study, runs: Sequence[StudyRun], known: Sequence[Experiment]) -> dg.AssetsDefinition:
    """The fit of a study, over the points of its runs.

    Args:
        known: the experiments of the graph, among which the predicted one may be.
    """
    points = [run for run in runs if run.budget is not None]
    deps = [checkpoint_key(run.name, run.label) for run in points]
    deps += [scorecard_key(run.name, run.label) for run in points if run.experiment.evaluation]
    wanted = study.predict and study.predict.recipe
    for experiment in known:
        if experiment.name == wanted:
            deps.append(checkpoint_key(experiment.name, list(experiment.labelled_milestones())[-1][0]))

    @dg.asset(
        key=study_key(study.name),
        deps=deps,
        group_name=study.name,
        kinds={"html", "study"},
        owners=owned_by(),
        code_version="1",
        automation_condition=when_ready(),
        check_specs=[
            dg.AssetCheckSpec(
                HELD,
                asset=study_key(study.name),
                description="The run that is predicted, once it is there, has a loss within the 95% interval.",
            )
        ],
        description=f"A scaling law over {len(points)} runs, its error on the largest size, and a prediction.",
    )
    def fit(context: dg.AssetExecutionContext) -> dg.MaterializeResult:
        from openlm_pipeline.studies.stage import make_fit

        with user_errors():
            made = make_fit(study.name, Home.from_env(), context.log.info)
        held = made.facts.get("prediction_held")
        return dg.MaterializeResult(
            metadata={"page": dg.MetadataValue.path(str(made.path)), **metadata(made)},
            data_version=dg.DataVersion(made.version),
            check_results=[
                dg.AssetCheckResult(
                    check_name=HELD,
                    passed=held is not False,
                    description=None if "measured_loss" in made.facts else "the predicted run is not there yet",
                )
            ],
        )

    return fit
