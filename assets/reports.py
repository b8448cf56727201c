"""`report/<run>`: the page over all scorecards of a run."""

import dagster as dg

from assets.common import (
    baseline_key,
    checkpoint_key,
    metadata,
    owned_by,
    report_key,
    run_links,
    scorecard_key,
    scores_group,
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
        group_name=scores_group(experiment.group),
        kinds={"html", "report"},
        owners=owned_by(),
        code_version="1",
        automation_condition=when_ready(),
        description="Table of milestones, accuracy and loss against tokens, provenance: Markdown, HTML, CSV, Parquet.",
    )
    def report(context: dg.AssetExecutionContext) -> dg.MaterializeResult:
        import pyarrow.parquet as pq  # slow to import, as matplotlib is

        from openlm_pipeline.reports.curves import series, small_picture

        with user_errors():
            made = reporting.make_report(experiment, Home.from_env(), context.log.info)
        pages = {"report_page": made.path, "items_page": made.path.with_name("items.html")}
        facts = {name: dg.MetadataValue.path(str(page)) for name, page in pages.items() if page.exists()}
        rows = pq.read_table(tabular := made.path.with_name("table.parquet")).to_pylist()
        averages = [r for r in rows if (r["kind"], r["measure_kind"]) == ("milestone", "average")]
        headline = [r for r in averages if r["measure"] == averages[0]["measure"]]
        if picture := small_picture("average against tokens", series(headline, "value")):
            facts = {"averages": dg.MetadataValue.md(picture)} | facts
        text = made.path.with_name("report.md").read_text()
        return dg.MaterializeResult(
            metadata={
                **facts,
                **run_links(experiment),
                **metadata(made),
                **table([tabular], columns_key="columns"),
                "report": dg.MetadataValue.md(text),
            },
            data_version=dg.DataVersion(made.version),
        )

    return report
