"""What all assets share: keys, pools, metadata, and errors for the person who must act."""

import contextlib
import os
import re
from collections.abc import Generator, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import dagster as dg
from pydantic import PrivateAttr

from openlm_pipeline.errors import ConfigError, OpenLMError, disk_trouble
from openlm_pipeline.evaluation.suite import Suite
from openlm_pipeline.experiments import Dataset, Experiment
from openlm_pipeline.fingerprint import Tree, fingerprint, short
from openlm_pipeline.pools import DaskSettings
from openlm_pipeline.result import ALLOW_TAG, StageResult, parse_allow
from openlm_pipeline.runs import ledger
from openlm_pipeline.runs.folder import WANDB_URL, RunFolder
from openlm_pipeline.shards.opening import open_dataset
from openlm_pipeline.storage.home import Home
from openlm_pipeline.units import format_tokens

DATA_VERSION_TAG = "dagster/data_version"
CODE_VERSION_TAG = "dagster/code_version"

CPU_POOL, TRAINING_POOL, EVALUATION_POOL = "cpu", "training", "evaluation"

PREFLIGHT_KEY = dg.AssetKey(["preflight"])
CORPUS_KEY = dg.AssetKey(["corpus", "embedded"])

_STARTED_BY = (
    "dagster/sensor_name",
    "dagster/schedule_name",
    "dagster/auto_materialize",
    "dagster/from_automation_condition",
)
"""Tags of a run that nobody asked for by hand."""

OWNERS = "OPENLM_OWNERS"
DEFAULT_OWNERS = "team:openlm_pipeline"


class DaskResource(dg.ConfigurableResource):
    """The Dask cluster of tokenization: a LocalCluster, the scheduler at `address`, or what OPENLM_DASK's file says."""

    address: str | None = None
    workers: int | None = None
    """Processes of the LocalCluster; by default one per CPU."""

    def settings(self) -> DaskSettings:
        return DaskSettings.from_env(address=self.address, workers=self.workers)


class RunEnd(dg.ConfigurableResource):
    """Closes at the end of a run what its steps left open.

    Interrupted while it handles an output, Dagster drops our generator where it stands. The interpreter closes it at
    its own end, when a job on a cluster can't be cancelled any more.
    """

    _stack: contextlib.ExitStack = PrivateAttr()

    @contextlib.contextmanager
    def yield_for_execution(self, context: dg.InitResourceContext) -> Iterator["RunEnd"]:
        with contextlib.ExitStack() as self._stack:
            yield self

    def closes(self, events: Generator[Any, None, None]) -> Generator[Any, None, None]:
        """`events`, which are closed if nobody reads them to their end."""
        self._stack.callback(events.close)
        return events


def owners() -> list[str]:
    """Who owns the assets: OPENLM_OWNERS, teams and e-mail addresses with commas between them.

    Raises:
        ConfigError: one is neither.
    """
    found = [owner.strip() for owner in (os.environ.get(OWNERS) or DEFAULT_OWNERS).split(",")]
    for owner in found:
        if not re.fullmatch(r"team:[\w.-]+|[\w.+-]+@[\w-]+(\.[\w-]+)+", owner):
            raise ConfigError(f"{OWNERS}: {owner!r} is neither team:NAME nor an e-mail address")
    return found


def owned_by() -> list[str]:
    """The owners that an asset shows; the default ones where OPENLM_OWNERS is wrong, which is an asset of its own."""
    try:
        return owners()
    except ConfigError:
        return [DEFAULT_OWNERS]


def tokenizer_key(name: str) -> dg.AssetKey:
    return dg.AssetKey(["tokenizer", name])


def raw_key(dataset: Dataset) -> dg.AssetKey:
    return dg.AssetKey(["raw_files", dataset.name])


def tokenized_key(dataset: Dataset) -> dg.AssetKey:
    return dg.AssetKey(["tokenized", dataset.name])


def shards_key(dataset: Dataset) -> dg.AssetKey:
    return dg.AssetKey(["shards", dataset.name])


def checkpoint_key(run: str, label: str) -> dg.AssetKey:
    return dg.AssetKey(["checkpoint", run, label])


def scorecard_key(run: str, label: str) -> dg.AssetKey:
    return dg.AssetKey(["scorecard", run, label])


def baseline_key(name: str) -> dg.AssetKey:
    return dg.AssetKey(["scorecard", "baseline", name])


def task_files_key(suite: Suite) -> dg.AssetKey:
    return dg.AssetKey(["task_files", suite.name])


def contamination_key(dataset: Dataset, suite: Suite) -> dg.AssetKey:
    return dg.AssetKey(["contamination", dataset.name, suite.name])


def scores_group(run: str) -> str:
    """Apart from its checkpoints, as the graph shows the last part of a key alone: `t0250B` of both."""
    return f"{run}_scores"


def study_key(name: str) -> dg.AssetKey:
    return dg.AssetKey(["study", name])


def report_key(run: str) -> dg.AssetKey:
    return dg.AssetKey(["report", run])


@cache
def when_ready() -> dg.AutomationCondition:
    """Make it when what it is made from is new and has passed its blocking checks; switched on in the UI."""
    condition = dg.AutomationCondition.eager() & dg.AutomationCondition.all_deps_blocking_checks_passed()
    return condition.with_label("new and checked")


def planned(context: dg.AssetExecutionContext | dg.AssetCheckExecutionContext) -> set[dg.AssetKey]:
    """The assets that the run is to make."""
    events = context.instance.all_logs(context.run.run_id, of_type=dg.DagsterEventType.ASSET_MATERIALIZATION_PLANNED)
    return {key for event in events if (key := event.get_dagster_event().asset_key) is not None}


def code_version(tree: Tree) -> str:
    """The code version of an asset whose settings are `tree`: changed settings show as stale."""
    return short(fingerprint(tree))


def shown(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Facts as Dagster metadata: web addresses can be clicked, and numbers, of six digits, are plotted by the UI."""

    def value(fact: Any) -> Any:
        if isinstance(fact, float):
            return float(f"{fact:.6g}")
        if isinstance(fact, str) and fact.startswith(("http://", "https://")):
            return dg.MetadataValue.url(fact)
        if isinstance(fact, dict):
            return dg.MetadataValue.json({k: value(v) for k, v in fact.items()})
        return fact if isinstance(fact, (int, str, dg.MetadataValue)) else dg.MetadataValue.json(fact)

    return {k: value(v) for k, v in facts.items() if v is not None and v != [] and v != {}}


def place(path: Path) -> dict[str, Any]:
    """Where an artefact is: its path here, its URI for everyone, and its size; made-up shards have neither of these."""
    if not path.exists():
        return {"path": dg.MetadataValue.path(str(path))}
    home = Home.from_env()
    inside = home.url is not None and path.is_relative_to(home.root)
    files = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
    return {
        "path": dg.MetadataValue.path(str(path)),
        "dagster/uri": f"{home.url}/{path.relative_to(home.root)}" if inside else path.absolute().as_uri(),
        "size_bytes": sum(p.stat().st_size for p in files),
    }


def table(
    parquets: Sequence[Path], about: Mapping[str, str] = {}, columns_key: str = "dagster/column_schema"
) -> dict[str, Any]:
    """Columns and number of rows of a table in one or more Parquet files, as they say themselves; {} for none.

    Args:
        about: descriptions of columns of files that don't have them.
        columns_key: Dagster shows its own above all else, where a page may have something that people want more.
    """
    if not parquets:
        return {}
    import pyarrow.parquet as pq  # slow to import, and loading the definitions needs none of it

    columns = [
        dg.TableColumn(
            field.name,
            str(field.type),
            (field.metadata or {}).get(b"description", b"").decode() or about.get(field.name),
            dg.TableColumnConstraints(nullable=field.nullable),
        )
        for field in pq.read_schema(parquets[0])
    ]
    return {
        columns_key: dg.TableSchema(columns),
        "dagster/row_count": sum(pq.read_metadata(path).num_rows for path in parquets),
    }


def made_from(experiment: Experiment, label: str) -> dict[str, Any]:
    """Where to look at a milestone's run; datasets with their shares and tokens, size of the model, and the trainer's
    machine and commit."""
    from openlm_pipeline.models import count_parameters

    datasets, home = experiment.training_datasets(), Home.from_env()
    folder = RunFolder(home.run(experiment.name, experiment.version))
    whole = sum(d.source.weight for d in datasets)
    data = [
        f"{d.name} {d.version}: {d.source.weight / whole:.0%} of what is read, it has "
        f"{format_tokens(open_dataset(d, home).info['totals']['tokens'], 4)} tokens"
        for d in datasets
    ]
    facts = {"data": dg.MetadataValue.md("\n\n".join(data)), **ledger.trained_on(folder, label)}
    facts |= {"parameters": count_parameters(experiment.model_config_resolved())}
    run = f"{experiment.name}/{experiment.version}"
    facts |= {"trace": dg.MetadataValue.md(f"`openlm trace {run}@{label}`, `openlm trace {run} --spike`")}
    return {**run_links(experiment), **shown(facts)}


def run_links(experiment: Experiment) -> dict[str, Any]:
    """Where to look at a run: its folder, and what `execution.report_to` made."""
    folder = Home.from_env().run(experiment.name, experiment.version)
    links = {"run_folder": dg.MetadataValue.path(str(folder))}
    if "tensorboard" in experiment.execution.report_to:
        links["tensorboard"] = dg.MetadataValue.path(str(folder / "tensorboard"))
    if "wandb" in experiment.execution.report_to and (folder / WANDB_URL).exists():
        links["wandb"] = dg.MetadataValue.url((folder / WANDB_URL).read_text())
    return links


def metadata(result: StageResult) -> dict[str, Any]:
    """A stage's result as Dagster metadata, in the order in which the UI shows it."""
    return {**shown(result.facts), "reused": result.reused, "version": short(result.version), **place(result.path)}


def allowed(context: dg.OpExecutionContext | dg.AssetExecutionContext) -> frozenset[str]:
    """The consents of a run: its tag `openlm/allow`. Automation never consents.

    Raises:
        dg.Failure: the tag names what is no consent.
    """
    tags = context.run.tags
    with user_errors():
        found = parse_allow(tags.get(ALLOW_TAG))
    return frozenset() if any(tag in tags for tag in _STARTED_BY) else found


@contextlib.contextmanager
def user_errors() -> Iterator[None]:
    """Turn an expected error into a failure whose description is the error's text, not a traceback; no retry helps."""
    try:
        yield
    except OpenLMError as e:
        raise dg.Failure(description=str(e), allow_retries=False) from e
    except OSError as e:
        if (said := disk_trouble(e)) is None:
            raise
        raise dg.Failure(description=said, allow_retries=False) from e
