"""`report/<run>`: the page over all scorecards of a run."""

import dagster as dg

from assets.common import (
    baseline_key,
    checkpoint_key,
    metadata,
    report_key,
    run_links,
    scorecard_key,
    table,
    user_errors,
    when_ready,
)
from openlm_pipeline.experiments import Experiment
from openlm_pipeline.pipeline import reports as reporting
from openlm_pipeline.storage.home import Home


def report_asset(experiment: Experiment) -> dg.AssetsDefinition:
    """The report of a run, over its scorecards, or over its checkpoints where it has no evaluation."""
    key_of = scorecard_key if experiment.evaluation else checkpoint_key
    baselines = experiment.evaluation.baselines if experiment.evaluation else ()

    @dg.asset(
        key=report_key(experiment.name),
        deps=[
            *(key_of(experiment.name, label) for label, _ in experiment.labelled_milestones()),
            *(baseline_key(b.name) for b in baselines),
        ],
        group_name=experiment.name,
        kinds={"html", "report"},
        code_version="1",
        automation_condition=when_ready(),
        description="Table of milestones, accuracy and loss against tokens, provenance: Markdown, HTML, CSV, Parquet.",
    )
    def report(context: dg.AssetExecutionContext) -> dg.MaterializeResult:
        with user_errors():
            made = reporting.make_report(experiment, Home.from_env(), context.log.info)
        text = made.path.with_name("report.md").read_text()
        return dg.MaterializeResult(
            metadata={
                **metadata(made),
                **table([made.path.with_name("table.parquet")]),
                **run_links(experiment),
                "report": dg.MetadataValue.md(text),
            },
            data_version=dg.DataVersion(made.version),
        )

    return report
