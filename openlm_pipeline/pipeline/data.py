"""From raw text to shards as plain functions, one per stage.

Each stage looks at what is on disk, does only what is missing or no longer matches, and says whether it reused what
was there. `version` is the content hash that the next stage depends on. No stage needs Dagster.
"""

import os
import time
from collections.abc import Collection
from contextlib import nullcontext
from pathlib import Path

from openlm_pipeline.corpus.discovery import RawFile, discover
from openlm_pipeline.corpus.excluded import read_excluded
from openlm_pipeline.errors import ConfigError
from openlm_pipeline.experiments import Dataset, Experiment, TokenizerSpec
from openlm_pipeline.pools import PoolFactory
from openlm_pipeline.result import Say, StageResult
from openlm_pipeline.shards.dataset import ShardedDataset
from openlm_pipeline.shards.extended import ExtendedDataset
from openlm_pipeline.shards.opening import Opened, bring_and_open, open_dataset, open_extended, published_url
from openlm_pipeline.shards.publish import publish
from openlm_pipeline.storage.home import Home
from openlm_pipeline.tokenization.documents import FileTokens, files_to_add, results
from openlm_pipeline.tokenization.exchange import Exchange
from openlm_pipeline.tokenization.job import tokenize_files
from openlm_pipeline.tokenizers.tokenizer import make_tokenizer, read_tokenizer_info, tokenizer_file


def make_corpus(experiment: Experiment, home: Home, report: Say) -> StageResult | None:
    """Make the embedded corpus where the experiment uses it; None where all sources are files of the user's."""
    if all(d.source.origin == "files" for d in experiment.datasets()):
        return None
    from openlm_pipeline.corpus.embedded import build_embedded

    with home.artefact(home.raw("embedded")):
        return build_embedded(home, report)


def ensure_tokenizer(experiment: Experiment, home: Home, report: Say, allow: Collection[str] = ()) -> StageResult:
    """Train or fetch the experiment's tokenizer; it is trained on the first source.

    Raises:
        MissingInputError: the raw files are not there (said before anything is fetched), or the tokenizer is not.
    """
    spec: TokenizerSpec = experiment.tokenizer
    first = experiment.training_datasets()[0]
    files = discover(first, home) if first.source.files else []
    if before := open_extended(first, home):  # it is that of the first version
        names = before.segments[0].info["inputs"]
        files = [raw for raw in files if raw.name in names]
    folder = home.tokenizer(spec.name)
    with home.artefact(folder):
        info, reused, changed = make_tokenizer(spec, files, first.source.text_key, folder, allow)
    if changed:
        report(f"tokenizer {spec.name} was made again: {'; '.join(changed)}")
    facts = {"vocab_size": info.vocab_size, "largest_id": info.largest_id, "eot_id": info.eot_id, "changed": changed}
    if info.switched_off:
        report(f"tokenizer {spec.name}: {' and '.join(info.switched_off)} of its tokenizer.json are switched off")
    return StageResult(tokenizer_file(folder), info.sha256, reused, facts)


def located(dataset: Dataset, home: Home) -> Dataset:
    """The dataset with the place of its source's `exclude`, which may begin at the home."""
    if dataset.source.exclude is None:
        return dataset
    source = dataset.source.model_copy(update={"exclude": home.resolve(dataset.source.exclude)})
    return dataset.model_copy(update={"source": source})


def tokenize(
    dataset: Dataset, home: Home, pools: PoolFactory, report: Say, only: set[str] | None = None
) -> tuple[list[FileTokens], list[str]]:
    """Stage 1 over the raw files of a dataset (or those named in `only`); ready-made shards have none.

    Returns:
        One result a file, sorted by name, and the names of the files that were not done already.
    """
    if dataset.source.shards:
        return [], []
    dataset = located(dataset, home)
    if dataset.source.exclude:
        read_excluded(dataset.source.exclude)  # a list that can't be read is no damage to a raw file
    raw_files: list[RawFile] = [raw for raw in discover(dataset, home) if only is None or raw.name in only]
    tokenizer_folder = home.tokenizer(dataset.tokenizer.name)
    home.pull(tokenizer_folder)
    info = read_tokenizer_info(tokenizer_folder)
    tokenized = home.tokenized(dataset.name, dataset.version)
    if before := open_extended(dataset, home):
        inputs = before.info["inputs"]
        if only is None or not only <= inputs.keys():
            stamps = {file.name: file.stamp for file in files_before(dataset, home)}
            raw_files = files_to_add(dataset, raw_files, info, inputs, stamps)
        else:
            raw_files = []
    with home.artefact(tokenized):
        args = (dataset, raw_files, info, tokenizer_folder, tokenized, pools, report)
        files, done = tokenize_files(*args, whole=only is None, exchange=_exchange(dataset))
    skipped = len(raw_files) - len(files)
    report(
        f"{dataset.name}: {len(done)} raw files tokenized, {len(files) - len(done)} reused"
        + (f", {skipped} left out (on_bad_file: skip)" if skipped else "")
    )
    if found := sum(file.special_strings or 0 for file in files):
        became = "their tokens" if dataset.source.special_tokens == "ids" else "ordinary text"
        report(f"{dataset.name}: strings of special tokens stand in documents {found} times and became {became}")
    return files, done


def _exchange(dataset: Dataset) -> Exchange | None:
    """Where workers without a shared disk hand on what they make of a dataset: below `OPENLM_EXCHANGE`.

    Raises:
        ConfigError: the shards have no place in a store.
    """
    if not (url := os.environ.get("OPENLM_EXCHANGE")):
        return None
    if not published_url(dataset):
        raise ConfigError(
            "OPENLM_EXCHANGE is for workers that share no disk, and so the shards need a place that all can reach: set "
            "the recipe's shards_url"
        )
    return Exchange(f"{url.rstrip('/')}/{dataset.name}/{dataset.version}")


def files_before(dataset: Dataset, home: Home) -> list[FileTokens]:
    """Stage 1 of the versions that a dataset extends, as far as it is still there."""
    before = open_extended(dataset, home)
    versions = [segment.info["version"] for segment in before.segments] if before else []
    return [file for version in versions for file in results(home.tokenized(dataset.name, version))]


def make_shards(
    dataset: Dataset,
    files: list[FileTokens],
    home: Home,
    pools: PoolFactory,
    report: Say,
    allow: Collection[str] = (),
) -> StageResult:
    """Stage 2: shards and manifest of a dataset from the results of stage 1, copied to `shards_url` if there is one.

    Ready-made shards are only opened.
    """
    if dataset.source.shards:
        made = open_dataset(dataset, home, whole=True)
        report(f"{dataset.name}: {len(made)} ready-made samples of {dataset.seq_len + 1} tokens")
        return StageResult(made.folder, made.version, True, made.info["totals"])
    from openlm_pipeline.tokenization.packing_job import pack_shards  # with it comes Arrow, which is slow to import

    started = time.monotonic()
    info = read_tokenizer_info(home.tokenizer(dataset.tokenizer.name))
    folder: Path = home.shards(dataset.name, dataset.version)
    tokenized = home.tokenized(dataset.name, dataset.version)
    url, before = published_url(dataset), open_extended(dataset, home)
    how = {"local": not url, "extends": before and before.version, "exchange": _exchange(dataset), "target": url}
    with nullcontext() if url else home.artefact(folder):  # what has a place of its own does not go to the home's too
        reused, changed = pack_shards(dataset, files, info, tokenized, folder, pools, report, allow, **how)
    if url:
        publish(folder, url, report, delete_local=not dataset.keep_local_shards)
    made: Opened = ShardedDataset(folder)
    if before:
        made = ExtendedDataset(before, made)
    totals = made.info["totals"]
    report(
        f"{dataset.name}: {totals['samples']} samples of {dataset.seq_len + 1} tokens in {totals['shards']} shards "
        + ("reused" if reused else "made")
        + (f", of which {len(before)} in {len(before.shard_sizes)} are {dataset.source.extends}'s" if before else "")
    )
    facts = {**totals, "changed": changed}
    if "dropped" in totals:  # of the documents; the other is what is new in the settings
        facts |= {"dropped_by_reason": made.info.get("dropped", {}), "changed_documents": totals["changed"]}
    if "breakdown" in made.info:
        facts["breakdown"] = made.info["breakdown"]
    if not reused:
        seconds = time.monotonic() - started
        facts |= {"seconds": seconds, "tokens_per_second": totals["tokens"] / seconds}
    return StageResult(folder, made.version, reused, facts)


def dataset_versions(experiment: Experiment, home: Home) -> dict[str, str]:
    """sha256 of the manifest of each training dataset.

    Raises:
        MissingInputError: a dataset is not there.
    """
    return {d.name: bring_and_open(d, home).version for d in experiment.training_datasets()}
