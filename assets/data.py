"""From raw files to shards: `corpus/embedded`, `raw_files/*`, `tokenizer/*`, `tokenized/*`, `shards/*`."""

import contextlib
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import dagster as dg

from assets.common import (
    CODE_VERSION_TAG,
    CORPUS_KEY,
    CPU_POOL,
    DATA_VERSION_TAG,
    PREFLIGHT_KEY,
    DaskResource,
    allowed,
    code_version,
    metadata,
    owned_by,
    place,
    planned,
    raw_key,
    shards_key,
    shown,
    table,
    tokenized_key,
    tokenizer_key,
    user_errors,
)
from openlm_pipeline.corpus.discovery import discover
from openlm_pipeline.corpus.excluded import read_excluded
from openlm_pipeline.corpus.maps import largest_first, map_identity
from openlm_pipeline.errors import ConfigError, DataError, OpenLMError
from openlm_pipeline.experiments import Dataset, Experiment
from openlm_pipeline.fingerprint import settings_tree
from openlm_pipeline.pipeline import data as data_stages
from openlm_pipeline.pools import DaskSettings
from openlm_pipeline.result import ProgressLine, Say, StageResult
from openlm_pipeline.shards.dataset import ShardedDataset
from openlm_pipeline.shards.opening import Opened, open_dataset, published_url
from openlm_pipeline.shards.synthetic import SyntheticDataset
from openlm_pipeline.storage.home import Home
from openlm_pipeline.storage.remote import public
from openlm_pipeline.tokenization.documents import (
    FIRST_MAX_BAD_FRACTION,
    STAGE_VERSION,
    FileTokens,
    files_tree,
    record_offsets,
)
from openlm_pipeline.tokenization.packing import PACKING_VERSION, packing_tree
from openlm_pipeline.tokenizers.engine import load_any
from openlm_pipeline.tokenizers.tokenizer import TRAINING_VERSION, tokenizer_file

_CHECKS = (  # name, whether it blocks, what it says
    ("tokens_conserved", True, "Tokens of the raw files = tokens in the shards + those of the tail that is left out."),
    ("shard_checksums", True, "Shards have the sha256 of the manifest; those read before or in a store, its size."),
    ("round_trip", True, "Documents drawn from the shards are, token by token, the text of their raw records."),
    ("quarantine_rate", False, "Share of bad records, against the source's max_bad_fraction."),
    ("no_file_left_out", False, "No raw file was left out because it is damaged (the source's on_bad_file: skip)."),
)
_EVENTS_PER_QUERY = 1000
_SHOWN_TOKENS = 300
_LAST_CHECKS = 20
_CLOCKS_APART = 60.0
"""Seconds by which the clock of a file server may differ from ours."""
_MOST_ROWS = 100
"""Of the table of a breakdown; all of it is in `dataset.json`."""


def corpus_asset(experiment: Experiment) -> dg.AssetsDefinition:
    """The embedded corpus; `experiment` is any that uses it."""

    @dg.asset(
        key=CORPUS_KEY,
        deps=[PREFLIGHT_KEY],
        group_name="raw_files",
        kinds={"python", "corpus"},
        owners=owned_by(),
        code_version="1",
        pool=CPU_POOL,
        description="Real text that every installation has: the Python standard library's and packages' documentation "
        "and source, as Pile-like .jsonl.zst files, with held-out text and tasks made from it.",
    )
    def embedded_corpus(context: dg.AssetExecutionContext) -> dg.MaterializeResult:
        with user_errors():
            made = data_stages.make_corpus(experiment, Home.from_env(), context.log.info)
        return dg.MaterializeResult(metadata=metadata(made), data_version=dg.DataVersion(made.version))

    return embedded_corpus


def tokenizer_asset(experiment: Experiment) -> dg.AssetsDefinition:
    """The tokenizer of an experiment."""
    spec = experiment.tokenizer
    of_embedded = experiment.training_datasets()[0].source.origin == "embedded" and spec.train
    deps = [PREFLIGHT_KEY, *([CORPUS_KEY] if of_embedded else [])]
    made_how = f"A byte-level BPE of {spec.train.vocab_size} ids." if spec.train else f"From {spec.source}."

    @dg.asset(
        key=tokenizer_key(spec.name),
        deps=deps,
        group_name="tokenizers",
        kinds={"huggingface", "tokenizer"},
        owners=owned_by(),
        code_version=code_version({"spec": settings_tree(spec, {"source"}), "code": TRAINING_VERSION}),
        pool=CPU_POOL,
        description=made_how,
    )
    def tokenizer(context: dg.AssetExecutionContext) -> dg.MaterializeResult:
        with user_errors():
            made = data_stages.ensure_tokenizer(experiment, Home.from_env(), context.log.info, allowed(context))
        return dg.MaterializeResult(metadata=metadata(made), data_version=dg.DataVersion(made.version))

    return tokenizer


def _map_version(dataset: Dataset) -> dict[str, str]:
    """What the code of the source's map, and its list of records to leave out, are by now; where they can't be looked
    at, the stage says why when it runs."""
    found: dict[str, str] = {}
    if dataset.source.map is not None:
        try:
            found |= map_identity(dataset.source.map)
        except ConfigError:
            found["map_sha256"] = "not there"
    if dataset.source.exclude is not None:
        try:
            place = data_stages.located(dataset, Home.from_env()).source.exclude
            found["exclude_sha256"] = read_excluded(place).sha256
        except OpenLMError:
            found["exclude_sha256"] = "not there"
    return found


def _files_code_version(dataset: Dataset) -> str:
    source = {**files_tree(dataset), "max_bad_fraction": FIRST_MAX_BAD_FRACTION}  # as it was in the first release
    return code_version(
        {
            "source": source,
            "tokenizer": settings_tree(dataset.tokenizer, {"source"}),
            "code": STAGE_VERSION,
            **_map_version(dataset),
        }
    )


def _shards_code_version(dataset: Dataset) -> str:
    return code_version(
        {
            "dataset": packing_tree(dataset),
            "files": _files_code_version(dataset),
            "code": PACKING_VERSION,
            **({"extends": dataset.source.extends} if dataset.source.extends else {}),
        }
    )


def partitions(dataset: Dataset) -> dg.DynamicPartitionsDefinition:
    """One partition per raw file."""
    return dg.DynamicPartitionsDefinition(name=f"{dataset.name}_files")


def _observe(context: dg.OpExecutionContext, dataset: Dataset) -> None:
    """Register the raw files that are there as partitions, and their stamps as data versions where they changed."""
    with user_errors():
        files = discover(dataset, Home.from_env())
    names = [raw.name for raw in files]
    partitions_name = partitions(dataset).name
    known = context.instance.get_dynamic_partitions(partitions_name)
    context.instance.add_dynamic_partitions(partitions_name, [n for n in names if n not in known])
    for gone in set(known) - set(names):
        context.instance.delete_dynamic_partition(partitions_name, gone)
    # The version that staleness goes by is that of the latest observation; only a materialization fills a partition.
    for event, kind in (
        (dg.AssetObservation, dg.DagsterEventType.ASSET_OBSERVATION),
        (dg.AssetMaterialization, dg.DagsterEventType.ASSET_MATERIALIZATION),
    ):
        latest = _latest(context, raw_key(dataset), kind)
        for raw in files:
            _, tags = latest.get(raw.name, (None, {}))
            if tags.get(DATA_VERSION_TAG) != raw.stamp:
                uri = public(raw.url) if "://" in raw.url else Path(raw.url).as_uri()
                facts = shown({"url": public(raw.url), "size_bytes": raw.size_bytes}) | {"dagster/uri": uri}
                version = {DATA_VERSION_TAG: raw.stamp}
                context.log_event(event(raw_key(dataset), partition=raw.name, metadata=facts, tags=version))


def _latest(
    context: dg.OpExecutionContext, key: dg.AssetKey, kind: dg.DagsterEventType
) -> dict[str, tuple[int, dict[str, str]]]:
    """Partition -> storage id and tags of its latest event, by a query for each thousand partitions."""
    ids = list(context.instance.get_latest_storage_id_by_partition(key, kind).values())
    fetch = (
        context.instance.fetch_observations
        if kind == dg.DagsterEventType.ASSET_OBSERVATION
        else context.instance.fetch_materializations
    )
    found: dict[str, tuple[int, dict[str, str]]] = {}
    for start in range(0, len(ids), _EVENTS_PER_QUERY):
        some = ids[start : start + _EVENTS_PER_QUERY]
        for record in fetch(dg.AssetRecordsFilter(asset_key=key, storage_ids=some), limit=len(some)).records:
            event = record.asset_observation or record.asset_materialization
            found[record.partition_key] = record.storage_id, event.tags or {}
    return found


def _report_files(
    context: dg.OpExecutionContext, dataset: Dataset, files: Sequence[FileTokens], done: set[str]
) -> None:
    """Log a materialization for each file that was tokenized, or that Dagster does not know in this version."""
    from openlm_pipeline.shards.inspect import quarantine_reasons  # pyarrow is slow to import

    folder = Home.from_env().tokenized(dataset.name, dataset.version)
    known = _latest(context, tokenized_key(dataset), dg.DagsterEventType.ASSET_MATERIALIZATION)
    observed = _latest(context, raw_key(dataset), dg.DagsterEventType.ASSET_OBSERVATION)
    raw, code = raw_key(dataset).to_user_string(), _files_code_version(dataset)
    tokenizer = tokenizer_key(dataset.tokenizer.name).to_user_string()
    for file in files:
        if file.name not in observed:  # of a version before, and no longer among the raw files
            continue
        storage_id, seen = observed[file.name]
        tags = {
            DATA_VERSION_TAG: file.version,
            CODE_VERSION_TAG: code,
            # The provenance that Dagster itself records for an asset's own step: without it a partition that is
            # logged from another step would show as stale, or never.
            f"dagster/input_data_version/{raw}": seen[DATA_VERSION_TAG],
            f"dagster/input_event_pointer/{raw}": str(storage_id),
            f"dagster/input_data_version/{tokenizer}": file.identity["tokenizer_sha256"],
            f"dagster/input_event_pointer/{tokenizer}": "NULL",  # its version says all: it has no partitions
        }
        _, recorded = known.get(file.name, (None, {}))
        if file.name not in done and all(recorded.get(k) == v for k, v in tags.items()):
            continue
        bad = folder / f"{file.name}.quarantine.jsonl"
        facts = {
            **place(folder / f"{file.name}.tokens"),
            "dagster/partition_row_count": file.documents,
            "documents": file.documents,
            "quarantined": file.quarantined,
            **({"quarantine_reasons": dict(quarantine_reasons(bad))} if file.quarantined and bad.exists() else {}),
            "tokens": file.tokens,
            "text_bytes": file.text_bytes,
            **({} if file.special_strings is None else {"special_strings": file.special_strings}),
            **(
                {"dropped": file.dropped, "changed": file.changed}
                if dataset.source.map or dataset.source.exclude
                else {}
            ),
            "engine": file.engine,
            **shown({"seconds": file.seconds, "tokens_per_second": file.tokens / max(file.seconds, 1e-3)}),
        }
        context.log_event(
            dg.AssetMaterialization(tokenized_key(dataset), partition=file.name, metadata=facts, tags=tags)
        )


def _progress(context: dg.OpExecutionContext, key: dg.AssetKey) -> Say:
    """Logs each line of a stage; those that tell progress are observations of the asset."""

    def report(line: str) -> None:
        if isinstance(line, ProgressLine):
            facts = {"progress": str(line), **shown(line.facts)}
            context.log_event(dg.AssetObservation(key, str(line), metadata=facts))
        else:
            context.log.info(line)

    return report


def _tokenize(context: dg.OpExecutionContext, dataset: Dataset, dask: DaskResource, only: set[str] | None) -> None:
    _observe(context, dataset)
    report = _progress(context, tokenized_key(dataset))
    with user_errors():
        home = Home.from_env()
        files, done = data_stages.tokenize(dataset, home, dask.settings().pool, report, only)
        before = [file for file in data_stages.files_before(dataset, home) if only is None or file.name in only]
    _report_files(context, dataset, [*before, *files], set(done))


def dataset_assets(dataset: Dataset) -> list[dg.AssetsDefinition | dg.AssetChecksDefinition]:
    """`raw_files`, `tokenized` and `shards` of one dataset, and the checks of its shards."""
    if dataset.source.shards:
        return _ready_made(dataset)
    upstream = [CORPUS_KEY] if dataset.source.origin == "embedded" else []
    files = partitions(dataset)

    @dg.multi_observable_source_asset(
        name=f"observe_{dataset.name}",
        partitions_def=files,
        specs=[
            dg.AssetSpec(
                raw_key(dataset),
                deps=upstream,
                partitions_def=files,
                skippable=True,
                group_name="raw_files",
                kinds={"raw_files"},
                owners=owned_by(),
                code_version="1",
                description=f"Raw text: {', '.join(dataset.source.files)}",
            )
        ],
    )
    def raw_files(context: dg.AssetExecutionContext):
        _observe(context, dataset)
        yield from ()

    @dg.multi_asset(
        name=f"tokenize_raw_files_{dataset.name}",
        partitions_def=files,
        backfill_policy=dg.BackfillPolicy.single_run(),
        pool=CPU_POOL,
        specs=[
            dg.AssetSpec(
                tokenized_key(dataset),
                deps=[raw_key(dataset), tokenizer_key(dataset.tokenizer.name)],
                partitions_def=files,
                skippable=True,
                group_name="tokenized",
                kinds={"dask", "tokenized"},
                owners=owned_by(),
                code_version=_files_code_version(dataset),
                description="Token streams and document indexes, one per raw file; several files are one run on Dask.",
            )
        ],
    )
    def tokenized(context: dg.AssetExecutionContext, dask: DaskResource):
        _tokenize(context, dataset, dask, set(context.partition_keys))
        yield from ()

    # Packing is a step of its own: Dagster reads the versions of a step's inputs when the step starts, so files that
    # are tokenized in the same run must be done before.
    @dg.op(
        name=f"tokenize_files_{dataset.name}", ins={"start": dg.In(dg.Nothing)}, out=dg.Out(dg.Nothing), pool=CPU_POOL
    )
    def tokenize_files(context: dg.OpExecutionContext, dask: DaskResource) -> None:
        _tokenize(context, dataset, dask, None)

    @dg.op(name=f"pack_{dataset.name}", ins={"start": dg.In(dg.Nothing)}, out=dg.Out(dg.Nothing), pool=CPU_POOL)
    def pack(context: dg.OpExecutionContext, dask: DaskResource) -> dg.Output:
        home, pools = Home.from_env(), dask.settings().pool
        with user_errors():
            done, _ = data_stages.tokenize(dataset, home, pools, context.log.debug)
            report = _progress(context, shards_key(dataset))
            made = data_stages.make_shards(dataset, done, home, pools, report, allowed(context))
        return dg.Output(None, data_version=dg.DataVersion(made.version), metadata=_shards_metadata(dataset, made))

    def nothing(key: dg.AssetKey, **kwargs: dg.PartitionMapping) -> dg.AssetIn:
        return dg.AssetIn(key=key, dagster_type=dg.Nothing, **kwargs)

    @dg.graph_asset(
        key=shards_key(dataset),
        group_name="shards",
        kinds={"dask", "shards"},
        owners=owned_by(),
        code_version=_shards_code_version(dataset),
        ins={
            "tokenized": nothing(tokenized_key(dataset), partition_mapping=dg.AllPartitionMapping()),
            "tokenizer": nothing(tokenizer_key(dataset.tokenizer.name)),
        },
        description=f"Samples of {dataset.seq_len + 1} tokens in a seeded global document order, in tar shards.",
    )
    def shards(tokenized, tokenizer):
        return pack(tokenize_files([tokenized, tokenizer]))

    @dg.multi_asset_check(
        name=f"check_shards_{dataset.name}",
        specs=[
            dg.AssetCheckSpec(name, asset=shards_key(dataset), blocking=blocking, description=description)
            for name, blocking, description in _CHECKS
        ],
    )
    def shard_checks(context: dg.AssetCheckExecutionContext) -> Iterator[dg.AssetCheckResult]:
        yield from _check_shards(context, dataset)

    return [raw_files, tokenized, shards, shard_checks]


def _shards_metadata(dataset: Dataset, made: StageResult) -> dict[str, object]:
    """As `metadata`, with how two samples begin, the provenance's columns, and the shards' size and place."""
    from openlm_pipeline.shards.provenance import COLUMNS  # pyarrow is slow to import

    shards = ShardedDataset(made.path)
    facts = metadata(made) | table(sorted(made.path.glob("*.provenance.parquet")), COLUMNS)
    if (made.path / shards.entries[0].tar).exists():  # they may be in a store alone
        decode = load_any(tokenizer_file(Home.from_env().tokenizer(dataset.tokenizer.name))).decode
        with contextlib.suppress(DataError):  # of a damaged shard, which the check of checksums names
            texts = {
                n: decode(shards[n][:_SHOWN_TOKENS].tolist(), skip_special_tokens=False) for n in (0, len(shards) // 2)
            }
            rows = [dg.TableRecord({"sample": n, "text": text}) for n, text in texts.items()]
            facts["texts"] = dg.MetadataValue.table(rows)
    if breakdown := made.facts.get("breakdown"):
        columns = (dataset.source.breakdown, "documents", "text_bytes", "tokens")
        shown_rows = largest_first(breakdown)[:_MOST_ROWS]
        rows = [dg.TableRecord(dict(zip(columns, (name, *counts)))) for name, counts in shown_rows]
        facts["breakdown"] = dg.MetadataValue.table(rows)
    facts["size_bytes"] = sum(entry.bytes for entry in shards.entries)
    if url := published_url(dataset):
        facts["dagster/uri"] = public(url)
    return facts


def _checked_before(context: dg.AssetCheckExecutionContext, key: dg.AssetKey, check: str, version: str) -> float:
    """When a check last found `version` of an asset good, seconds since 1970; 0 where it never did, or runs by itself.

    So a job reads again only what it made, and who asks for the check alone has everything read.
    """
    if key not in planned(context):
        return 0.0
    storage = context.instance.event_log_storage
    records = storage.get_asset_check_execution_history(dg.AssetCheckKey(key, check), limit=_LAST_CHECKS)
    events = [record.event.dagster_event for record in records if record.event]  # those of this run are planned alone
    made = [e.asset_check_evaluation_data for e in events if e.event_type == dg.DagsterEventType.ASSET_CHECK_EVALUATION]
    facts = next((evaluation.metadata for evaluation in made if evaluation.passed), {})
    if "read_from" not in facts or facts["version"].value != version:
        return 0.0
    return facts["read_from"].value - _CLOCKS_APART


def _verified(context: dg.AssetCheckExecutionContext, made: Opened, key: dg.AssetKey, check: str) -> dict[str, Any]:
    """Metadata of a check that compared the shards with their manifest.

    Raises:
        DataError: names the first shard that differs.
    """
    now = int(time.time())  # whole seconds, and those before: what changes in this one is read again
    read = made.verify(fetch=False, since=_checked_before(context, key, check, made.version))
    return {"shards": len(made.entries), "read": read, "version": made.version, "read_from": now}


def _check_shards(context: dg.AssetCheckExecutionContext, dataset: Dataset) -> Iterator[dg.AssetCheckResult]:
    """Results of `_CHECKS`; damage is a failed check, and what else is wrong, such as no shards, is an error."""
    from openlm_pipeline.shards.round_trip import round_trip  # slow to import

    def result(name: str, passed: bool, why: str | None = None, **facts: object) -> dg.AssetCheckResult:
        return dg.AssetCheckResult(
            asset_key=shards_key(dataset), check_name=name, passed=passed, description=why, metadata=shown(facts)
        )

    home = Home.from_env()
    with user_errors():
        made = open_dataset(dataset, home, whole=True)
        totals = made.info["totals"]
        in_shards = len(made) * made.format.sample_tokens - totals["padding_tokens"]
        yield result(
            "tokens_conserved",
            in_shards + totals["tail_tokens"] == totals["tokens"],
            tokens=totals["tokens"],
            in_shards=in_shards,
            tail=totals["tail_tokens"],
        )
        rate = totals["quarantined"] / max(1, totals["documents"] + totals["quarantined"])
        limit = dataset.source.max_bad_fraction
        yield result("quarantine_rate", rate <= limit, rate=rate, limit=limit, quarantined=totals["quarantined"])
        skipped = made.info.get("skipped", {})
        yield result("no_file_left_out", not skipped, "\n".join(skipped.values()) or None, files=len(skipped))
        try:
            facts = _verified(context, made, shards_key(dataset), "shard_checksums")
        except DataError as e:
            yield result("shard_checksums", False, str(e))
        else:
            yield result("shard_checksums", True, **facts)
        try:
            offsets = partial(record_offsets, home.tokenized(dataset.name, dataset.version))
            found = round_trip(
                made.segments[-1],
                discover(dataset, home),
                dataset.source.text_key,
                offsets=offsets,
                map=dataset.source.map,
            )
        except DataError as e:
            yield result("round_trip", False, str(e))
        else:
            wrong = "\n".join(found.damaged)
            yield result("round_trip", not wrong, wrong or None, exact=found.exact, lossy=found.lossy)


def _ready_made(dataset: Dataset) -> list[dg.AssetsDefinition | dg.AssetChecksDefinition]:
    """`shards` of a dataset that was made elsewhere, and the check that they are there."""

    @dg.asset(
        key=shards_key(dataset),
        deps=[tokenizer_key(dataset.tokenizer.name)],
        group_name="shards",
        kinds={"shards"},
        owners=owned_by(),
        code_version=code_version({"shards": dataset.source.shards, "seq_len": dataset.seq_len}),
        pool=CPU_POOL,
        description=f"Ready-made shards: {dataset.source.shards}",
    )
    def shards(context: dg.AssetExecutionContext) -> dg.MaterializeResult:
        with user_errors():
            made = data_stages.make_shards(dataset, [], Home.from_env(), DaskSettings().pool, context.log.info)
        return dg.MaterializeResult(metadata=metadata(made), data_version=dg.DataVersion(made.version))

    @dg.asset_check(name="shards_are_there", asset=shards_key(dataset), blocking=True)
    def shards_are_there(context: dg.AssetCheckExecutionContext) -> dg.AssetCheckResult:
        with user_errors():
            made = open_dataset(dataset, Home.from_env(), whole=True)
            facts = {"shards": len(made.shard_sizes)}
            if not isinstance(made, SyntheticDataset):  # synthetic ones are made as they are read
                facts = _verified(context, made, shards_key(dataset), "shards_are_there")
        return dg.AssetCheckResult(passed=True, metadata=facts)

    return [shards, shards_are_there]
