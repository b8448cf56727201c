"""The pipeline as plain functions, one a stage: what both the `openlm` command and the Dagster assets call.

Each stage looks at what is on disk, does only what is missing or no longer matches, and says whether it reused what
was there. `version` is the content hash that the next stage depends on. No stage needs Dagster.
"""

import time
from collections.abc import Iterator
from pathlib import Path

from openlm_pipeline import __version__
from openlm_pipeline.corpus.discovery import RawFile, discover
from openlm_pipeline.errors import ConfigError, DataError, IdentityError, MissingInputError
from openlm_pipeline.experiments import Dataset, Experiment, TokenizerSpec
from openlm_pipeline.files import folder_lock, set_aside, sha256_file
from openlm_pipeline.layout import Home
from openlm_pipeline.lineage.fingerprint import fingerprint
from openlm_pipeline.lineage.run_identity import run_identity
from openlm_pipeline.result import Report, StageResult
from openlm_pipeline.runs.checkpoints import Checkpoint, verify
from openlm_pipeline.runs.folder import RunFolder
from openlm_pipeline.runs.launch import Event, MilestoneReused, milestone_checkpoints, train_locally
from openlm_pipeline.shards.dataset import ShardedDataset
from openlm_pipeline.shards.opening import open_dataset, published_url
from openlm_pipeline.shards.publish import publish
from openlm_pipeline.tokenization.cluster import PoolFactory
from openlm_pipeline.tokenization.documents import FileTokens
from openlm_pipeline.tokenization.job import pack_shards, tokenize_files
from openlm_pipeline.tokenization.tokenizer import make_tokenizer, read_tokenizer_info, tokenizer_file


def make_corpus(experiment: Experiment, home: Home, report: Report) -> StageResult | None:
    """Make the embedded corpus where the experiment uses it; None where all sources are files of the user's."""
    if all(d.source.origin == "files" for d in experiment.datasets()):
        return None
    from openlm_pipeline.corpus.embedded import build_embedded

    return build_embedded(home, report)


def ensure_tokenizer(experiment: Experiment, home: Home, report: Report) -> StageResult:
    """Train or fetch the experiment's tokenizer; it is trained on the first source.

    Raises:
        MissingInputError: the raw files are not there (said before anything is fetched), or the tokenizer is not.
    """
    spec: TokenizerSpec = experiment.tokenizer
    first = experiment.training_datasets()[0]
    files = discover(first, home) if first.source.files else []
    folder = home.tokenizer(spec.name)
    info, reused, changed = make_tokenizer(spec, files, first.source.text_key, folder)
    if changed:
        report(f"tokenizer {spec.name} was made again: {'; '.join(changed)}")
    facts = {"vocab_size": info.vocab_size, "eot_id": info.eot_id, "changed": changed}
    return StageResult(tokenizer_file(folder), info.sha256, reused, facts)


def tokenize(
    dataset: Dataset, home: Home, pools: PoolFactory, report: Report, only: set[str] | None = None
) -> tuple[list[FileTokens], list[str]]:
    """Stage 1 over the raw files of a dataset (or those named in `only`); ready-made shards have none.

    Returns:
        One result a file, sorted by name, and the names of the files that were not done already.
    """
    if dataset.source.shards:
        return [], []
    raw_files: list[RawFile] = [raw for raw in discover(dataset, home) if only is None or raw.name in only]
    tokenizer_folder = home.tokenizer(dataset.tokenizer.name)
    info = read_tokenizer_info(tokenizer_folder)
    tokenized = home.tokenized(dataset.name, dataset.version)
    files, done = tokenize_files(dataset, raw_files, info, tokenizer_folder, tokenized, pools, report)
    report(f"{dataset.name}: {len(done)} raw files tokenized, {len(files) - len(done)} reused")
    return files, done


def make_shards(
    dataset: Dataset, files: list[FileTokens], home: Home, pools: PoolFactory, report: Report
) -> StageResult:
    """Stage 2: shards and manifest of a dataset from the results of stage 1, copied to `shards_url` if there is one.

    Ready-made shards are only opened.
    """
    if dataset.source.shards:
        made = open_dataset(dataset, home)
        report(f"{dataset.name}: {len(made)} ready-made samples of {dataset.seq_len + 1} tokens")
        return StageResult(made.folder, made.version, True, made.info["totals"])
    started = time.monotonic()
    info = read_tokenizer_info(home.tokenizer(dataset.tokenizer.name))
    folder: Path = home.shards(dataset.name, dataset.version)
    tokenized = home.tokenized(dataset.name, dataset.version)
    reused, changed = pack_shards(dataset, files, info, tokenized, folder, pools, report)
    if url := published_url(dataset):
        publish(folder, url, report, delete_local=not dataset.keep_local_shards)
    made = ShardedDataset(folder)
    totals = made.info["totals"]
    report(
        f"{dataset.name}: {totals['samples']} samples of {dataset.seq_len + 1} tokens in {totals['shards']} shards "
        + ("reused" if reused else "made")
    )
    facts = {**totals, "changed": changed}
    if not reused:
        seconds = time.monotonic() - started
        facts |= {"seconds": seconds, "tokens_per_second": totals["tokens"] / seconds}
    return StageResult(folder, made.version, reused, facts)


def dataset_versions(experiment: Experiment, home: Home) -> dict[str, str]:
    """sha256 of the manifest of each training dataset.

    Raises:
        MissingInputError: a dataset is not there.
    """
    return {d.name: open_dataset(d, home).version for d in experiment.training_datasets()}


def open_run(experiment: Experiment, home: Home) -> RunFolder:
    """The run folder of an experiment, which must be this experiment's on the data that is there.

    Raises:
        IdentityError: the run there was made from other settings or data; the message names what differs.
    """
    run = RunFolder(home.run(experiment.name, experiment.version))
    identity = run_identity(experiment, dataset_versions(experiment, home))
    if not run.belongs_to(identity):
        changed = "\n  ".join(run.differences(identity))
        raise IdentityError(f"{run.path} was trained from something else:\n  {changed}\nTrain it again first.")
    return run


def is_intact(checkpoint: Checkpoint) -> bool:
    """Whether every file of a checkpoint has its recorded hash."""
    try:
        verify(checkpoint)
    except DataError:
        return False
    return True


def checkpoint_result(checkpoint: Checkpoint, reused: bool) -> StageResult:
    """A milestone as the result of a stage."""
    facts = {"step": checkpoint.step, "tokens": checkpoint.tokens, **checkpoint.metrics}
    facts["bytes"] = sum(f["bytes"] for f in checkpoint.files.values())
    return StageResult(checkpoint.path, checkpoint.digest, reused, facts)


def train(
    experiment: Experiment, home: Home, until: int, report: Report, *, supersede: bool = False
) -> Iterator[MilestoneReused | Event]:
    """Train every milestone up to `until` tokens that is not there, with torchrun; yields what happens as it happens.

    Closing the iterator stops the trainer, which first saves a checkpoint.

    Args:
        supersede: set a run of other settings or data in the same folder aside, instead of refusing.

    Raises:
        IdentityError: the folder holds another run.
        BusyError: the run is being trained already.
        TrainingError: training ended early.
    """
    run = RunFolder(home.run(experiment.name, experiment.version))
    identity = run_identity(experiment, dataset_versions(experiment, home))
    with run.lock():  # so that the folder of a run that is training is not set aside under it
        changed = run.claim(experiment, identity, supersede=supersede)
    if changed:
        report(f"the run that was in {run.path} is set aside. What changed: {'; '.join(changed)}")
    wanted = {label for label, tokens in experiment.labelled_milestones() if tokens <= until}
    there = {label: c for label, c in milestone_checkpoints(experiment, run).items() if label in wanted}
    for label, checkpoint in list(there.items()):
        if not is_intact(checkpoint):
            report(f"milestone {label} is damaged and made again; what is left of it: {set_aside(checkpoint.path)}")
            del there[label]
    for label, checkpoint in there.items():
        report(f"milestone {label} reused")
        yield MilestoneReused(label, checkpoint)
    if wanted - set(there):
        yield from train_locally(experiment, home, run, until)


def score(experiment: Experiment, home: Home, label: str, report: Report) -> StageResult:
    """Score one milestone with the experiment's suite; tasks that are scored already are not scored again.

    Raises:
        ConfigError: the experiment has no evaluation, or no such milestone.
        MissingInputError: the milestone is not trained, or a task's file is missing.
    """
    from openlm_pipeline.evaluation.items import read_items
    from openlm_pipeline.evaluation.scorecard import Provenance, load_scorecard, make_scorecard, save_scorecard
    from openlm_pipeline.evaluation.scorer import score_suite
    from openlm_pipeline.evaluation.suite import load_suite
    from openlm_pipeline.runs.weights import LazyModel

    labels = [name for name, _ in experiment.labelled_milestones()]
    if experiment.evaluation is None:
        raise ConfigError(f"recipe {experiment.name} has no `evaluation.suite`")
    if label not in labels:
        raise ConfigError(f"recipe {experiment.name} has no milestone {label}; it has {', '.join(labels)}")
    run = open_run(experiment, home)
    checkpoint = milestone_checkpoints(experiment, run).get(label)
    if checkpoint is None:
        raise MissingInputError(
            f"milestone {label} is not in {run.checkpoints}; `openlm train {experiment.name}` makes it"
        )
    info = read_tokenizer_info(home.tokenizer(experiment.tokenizer.name))
    made_with = open_dataset(experiment.training_datasets()[0], home).info["tokenizer"]["sha256"]
    if made_with not in (None, info.sha256):  # OpenLM's shards don't say
        raise DataError(f"tokenizer {info.name} is not the one this run's shards were made with; tokenize again")
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(tokenizer_file(home.tokenizer(info.name))))
    suite = load_suite(experiment.evaluation.suite)
    out = home.scorecard(experiment.name, experiment.version, label)
    context = {
        "run": experiment.name,
        "run_version": experiment.version,
        "milestone": label,
        "step": checkpoint.step,
        "tokens": checkpoint.tokens,
    }
    with folder_lock(out, "scoring"):
        result = score_suite(
            LazyModel(checkpoint), tokenizer, suite, home, out, context,
            checkpoint_digest=checkpoint.digest,
            max_seq_len=experiment.model_config_resolved().seq_len,
            batch_tokens=experiment.evaluation.batch_tokens,
            report=report,
        )  # fmt: skip
        before = labels[labels.index(label) - 1] if labels[0] != label else None
        earlier = home.scorecard(experiment.name, experiment.version, before) / "items.parquet" if before else None
        card = make_scorecard(
            result.items,
            read_items(earlier)[0] if earlier and earlier.exists() else None,
            suite=suite,
            provenance=Provenance(
                **context,
                checkpoint_digest=checkpoint.digest,
                data_fingerprint=fingerprint({"data": run.identity["data"]}),
                tokenizer=info.name,
                validation_loss=checkpoint.metrics.get("validation_loss"),
            ),
            task_files=result.task_files,
        )
        there = out / "scorecard.json"
        reused = not result.scored and there.exists() and load_scorecard(there) == card
        if not reused:
            save_scorecard(out, card)
    report(f"scorecard {experiment.name} {label} {'reused' if reused else 'made'}: average accuracy {card.average:.3f}")
    accuracies = {f"accuracy_{t.task}": t.accuracy for t in card.tasks if t.category is None}
    facts = {"average": card.average, **accuracies, "validation_loss": card.validation_loss}
    facts |= {"scored_tasks": list(result.scored), "reused_tasks": list(result.reused)}
    return StageResult(out, fingerprint({"scorecard": card.model_dump(mode="json")}), reused, facts)


def make_report(experiment: Experiment, home: Home, report: Report) -> StageResult:
    """Write the report of a run over all its scorecards that are there; made anew each time, as it takes seconds."""
    from openlm_pipeline.evaluation.scorecard import load_scorecard
    from openlm_pipeline.reports import write_report

    run = open_run(experiment, home)
    cards = [
        load_scorecard(path)
        for label, _ in experiment.labelled_milestones()
        if (path := home.scorecard(experiment.name, experiment.version, label) / "scorecard.json").exists()
    ]
    out = home.report(experiment.name, experiment.version)
    provenance = {"run fingerprint": run.fingerprint, "openlm_pipeline": __version__}
    paths = write_report(out, experiment, cards, run.read_metrics(), provenance)
    page = paths["report.html"]
    report(f"report: {page}")
    facts = {"scorecards": len(cards), "milestones": len(experiment.milestones)}
    return StageResult(page, sha256_file(paths["table.csv"]), False, facts)
