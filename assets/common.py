"""What all assets share: keys, pools, metadata, and errors for the person who must act."""

import contextlib
from collections.abc import Iterator
from typing import Any

import dagster as dg

from openlm_pipeline.errors import OpenLMError
from openlm_pipeline.experiments import Dataset
from openlm_pipeline.lineage.fingerprint import Tree, fingerprint, short
from openlm_pipeline.result import StageResult
from openlm_pipeline.tokenization.cluster import DaskSettings

DATA_VERSION_TAG = "dagster/data_version"
CODE_VERSION_TAG = "dagster/code_version"

CPU_POOL, TRAINING_POOL, EVALUATION_POOL = "cpu", "training", "evaluation"

CORPUS_KEY = dg.AssetKey(["corpus", "embedded"])


class DaskResource(dg.ConfigurableResource):
    """The Dask cluster of tokenization: a LocalCluster, the scheduler at `address`, or what OPENLM_DASK's file says."""

    address: str | None = None
    workers: int | None = None
    """Processes of the LocalCluster; by default one a CPU."""

    def settings(self) -> DaskSettings:
        return DaskSettings.from_env(address=self.address, workers=self.workers)


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


def report_key(run: str) -> dg.AssetKey:
    return dg.AssetKey(["report", run])


def when_ready() -> dg.AutomationCondition:
    """Make it when what it is made from is new and has passed its blocking checks; switched on in the UI."""
    return dg.AutomationCondition.eager() & dg.AutomationCondition.all_deps_blocking_checks_passed()


def code_version(tree: Tree) -> str:
    """The code version of an asset whose settings are `tree`: changed settings show as stale."""
    return short(fingerprint(tree))


def metadata(result: StageResult) -> dict[str, Any]:
    """A stage's facts as Dagster metadata; numbers stay numbers, so that the UI plots them."""
    facts = {k: v for k, v in result.facts.items() if v is not None and v != [] and v != {}}
    shown = {k: v if isinstance(v, (int, float, str)) else dg.MetadataValue.json(v) for k, v in facts.items()}
    return {
        "path": dg.MetadataValue.path(str(result.path)),
        "version": short(result.version),
        "reused": result.reused,
    } | shown


@contextlib.contextmanager
def user_errors() -> Iterator[None]:
    """Turn an expected error into a failure whose description is the error's text, not a traceback; no retry helps."""
    try:
        yield
    except OpenLMError as e:
        raise dg.Failure(description=str(e), allow_retries=False) from e
