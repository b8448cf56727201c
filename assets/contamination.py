"""`task_files/<suite>` and `contamination/<dataset>/<suite>`: where items of a suite stand in a dataset."""

import re

import dagster as dg

from assets.common import (
    CPU_POOL,
    DATA_VERSION_TAG,
    DaskResource,
    code_version,
    contamination_key,
    metadata,
    owned_by,
    shards_key,
    task_files_key,
    user_errors,
)
from openlm_pipeline.evaluation.suite import Suite
from openlm_pipeline.experiments import Dataset
from openlm_pipeline.lineage import SCAN_VERSION
from openlm_pipeline.pipeline import contamination as stage
from openlm_pipeline.result import ProgressLine
from openlm_pipeline.storage.home import Home

_GROUP = "contamination"


def _word(name: str) -> str:
    return re.sub(r"\W", "_", name)


def task_files_asset(suite: Suite) -> dg.AssetsDefinition:
    """The files of a suite's tasks, observed: their hashes are the data version."""

    @dg.multi_observable_source_asset(
        name=f"observe_task_files_{_word(suite.name)}",
        specs=[
            dg.AssetSpec(
                task_files_key(suite),
                group_name=_GROUP,
                kinds={"task_files"},
                owners=owned_by(),
                code_version="1",
                description=f"The files of the tasks of the suite {suite.name}; an observation hashes them.",
            )
        ],
    )
    def task_files():
        with user_errors():
            version = dg.DataVersion(stage.task_files_version(suite, Home.from_env()))
        yield dg.ObserveResult(task_files_key(suite), data_version=version)

    return task_files


def contamination_asset(dataset: Dataset, suite_file: str, suite: Suite) -> dg.AssetsDefinition:
    """The scan of a dataset for a suite's items."""
    name = f"{dataset.name}_{_word(suite.name)}"

    # A step of its own, as for the shards: Dagster reads the versions of a step's inputs when the step starts.
    @dg.op(name=f"observe_task_files_{name}", ins={"start": dg.In(dg.Nothing)}, out=dg.Out(dg.Nothing), pool=CPU_POOL)
    def observe(context: dg.OpExecutionContext) -> None:
        with user_errors():
            version = stage.task_files_version(suite, Home.from_env())
        context.log_event(dg.AssetObservation(task_files_key(suite), tags={DATA_VERSION_TAG: version}))

    @dg.op(name=f"look_for_items_{name}", ins={"start": dg.In(dg.Nothing)}, out=dg.Out(dg.Nothing), pool=CPU_POOL)
    def look(context: dg.OpExecutionContext, dask: DaskResource) -> dg.Output:
        def report(line: str) -> None:
            facts = line.facts if isinstance(line, ProgressLine) else {}
            context.log_event(dg.AssetObservation(contamination_key(dataset, suite), str(line), metadata=facts))

        with user_errors():
            made = stage.scan_dataset(dataset, suite_file, Home.from_env(), dask.settings().pool, report)
        return dg.Output(None, data_version=dg.DataVersion(made.version), metadata=metadata(made))

    @dg.graph_asset(
        key=contamination_key(dataset, suite),
        group_name=_GROUP,
        kinds={"dask", "parquet"},
        owners=owned_by(),
        code_version=code_version({"scan": SCAN_VERSION, "suite": suite.digest}),
        ins={
            "shards": dg.AssetIn(key=shards_key(dataset), dagster_type=dg.Nothing),
            "task_files": dg.AssetIn(key=task_files_key(suite), dagster_type=dg.Nothing),
        },
        description=f"Where items of the suite {suite.name} stand in {dataset.name}: each shard is scanned once, and "
        "`openlm contamination`, `openlm items` and reports join any run and milestone to that.",
    )
    def contamination(shards, task_files):
        return look(observe([shards, task_files]))

    return contamination
