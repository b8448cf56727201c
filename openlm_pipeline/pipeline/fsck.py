"""Whether everything in a home is what was written: each finding with what it harms, and what mends it.

Reads all that has a recorded hash and compares, says what is missing, and touches nothing. `set_aside_damaged` renames
what is damaged, so that the stage that made it makes it again: nothing is deleted.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from openlm_pipeline.checkpoints.folders import COMPLETE, INFO, Checkpoint, read_checkpoint, verify
from openlm_pipeline.corpus.download_folder import RECORD_NAME, recorded_downloads
from openlm_pipeline.errors import DataError, OpenLMError
from openlm_pipeline.evaluation.items import read_items
from openlm_pipeline.evaluation.scorecard import check_items, load_scorecard
from openlm_pipeline.evaluation.scored import milestone_digest, scored_digest
from openlm_pipeline.lineage.suite_windows import load_windows
from openlm_pipeline.pipeline.contamination import FILE as JOINED
from openlm_pipeline.pipeline.evaluation import CARD
from openlm_pipeline.pipeline.overview import experiment_of
from openlm_pipeline.runs.folder import RunFolder
from openlm_pipeline.shards.inspect import check_shards
from openlm_pipeline.shards.manifest import MANIFEST
from openlm_pipeline.storage.files import is_held, is_set_aside, set_aside, sha256_file
from openlm_pipeline.storage.home import Home
from openlm_pipeline.storage.tables import read_table
from openlm_pipeline.tokenization.documents import check_streams
from openlm_pipeline.tokenizers.tokenizer import read_tokenizer_info


@dataclass(frozen=True)
class Damage:
    """Something that is not as it was written, or not there."""

    path: Path
    what: str
    harms: str
    mends: str
    """A command, or what a person must do."""
    movable: bool = True
    """Whether it is made again once it is out of the way."""


Found = Iterator[tuple[Path, Damage | None]]
"""What was looked at, in order, and what is wrong with it."""


def check_home(home: Home, *, quick: bool = False) -> Found:
    """Look at all artefacts of a home.

    Args:
        quick: at sizes and descriptions, not at the hashes of large files.
    """
    for check in _CHECKS:
        yield from check(home, quick)


def set_aside_damaged(damaged: list[Damage]) -> list[Path]:
    """Rename what is damaged and can be made again; the new paths."""
    return [set_aside(path) for path in sorted({d.path for d in damaged if d.movable}) if path.exists()]


def _raw(home: Home, quick: bool) -> Found:
    for folder in sorted({path.parent for path in (home.root / "raw").rglob(RECORD_NAME)}):
        again = f"openlm download --output-dir {folder} ..., the command that brought it"
        harms = "what is tokenized from now on is not what the manifest's sources say"
        try:
            files = recorded_downloads(folder)
        except OpenLMError as e:
            yield folder, Damage(folder, str(e), "downloads can't be resumed or checked", again, movable=False)
            continue
        for name, recorded in files.items():
            path, wrong = folder / name, None
            if not path.is_file():
                wrong = f"{path} is missing"
            elif (size := path.stat().st_size) != (recorded.size_bytes or size):
                wrong = f"{path} has {size} bytes, and had {recorded.size_bytes}"
            elif not quick and recorded.sha256 and sha256_file(path) != recorded.sha256:
                wrong = f"{path} does not have its recorded sha256: it is damaged"
            yield path, wrong and Damage(path, wrong, harms, again)


def _refused(check: Callable[..., object], *arguments: object) -> str | None:
    """What a check says that fails."""
    try:
        check(*arguments)
    except (OpenLMError, OSError) as e:
        return str(e)
    return None


def _folders(home: Home, pattern: str) -> list[Path]:
    """Those that nobody is writing in, without hidden ones and what was set aside."""
    found = [path for path in sorted(home.root.glob(pattern)) if path.is_dir() and not path.name.startswith(".")]
    return [path for path in found if not is_set_aside(path) and not is_held(path)]


def _tokenizers(home: Home, quick: bool) -> Found:
    for folder in _folders(home, "tokenizers/*"):
        wrong = _refused(read_tokenizer_info, folder)
        harms = "no stage takes it: no text is tokenized, and no model scored"
        yield folder, wrong and Damage(folder, wrong, harms, f"openlm tokenize RECIPE, with tokenizer {folder.name}")


def _streams(home: Home, quick: bool) -> Found:
    for folder in _folders(home, "tokenized/*/*"):
        again = f"openlm tokenize RECIPE, with dataset {folder.parent.name}"
        for path, wrong in check_streams(folder, quick=quick):
            harms = "a damaged shard can't be made again from it"
            yield path, wrong and Damage(path, wrong, harms, f"{again}, tokenizes this raw file again")


def _shards(home: Home, quick: bool) -> Found:
    for folder in _folders(home, "shards/*/*"):
        again = f"openlm tokenize RECIPE, with dataset {folder.parent.name}"
        if not (folder / MANIFEST).exists():
            what = f"{folder} has no {MANIFEST}: it was not finished, or lost it"
            yield folder, Damage(folder / MANIFEST, what, "no run can be trained on it", f"{again}, finishes it")
            continue
        try:
            for name, wrong in check_shards(folder, quick=quick):
                harms = "a run that reads it stops, and is not resumed"
                yield folder / name, wrong and Damage(folder / name, wrong, harms, f"{again}, makes this file again")
        except (OpenLMError, OSError) as e:
            harms, mends = "no run can be trained on it", f"bring {MANIFEST} back from a copy; or {again}"
            yield folder, Damage(folder, str(e), harms, mends, movable=False)


def _runs(home: Home, quick: bool) -> Found:
    for run in map(RunFolder, _folders(home, "runs/*/*")):
        name = run.path.parent.name
        if is_held(run.lock_folder) or not (run.has_begun or (run.path / "run.json").exists()):
            continue  # its trainer is at it, or it has nothing yet
        own = run.path / "run.json"
        try:
            experiment, identity = experiment_of(run), run.fingerprint
        except (OpenLMError, OSError) as e:
            harms = "the run can't be resumed, scored or reported"
            yield own, Damage(own, str(e), harms, f"bring {own.name} and experiment.yaml back from a copy", False)
            continue
        yield own, None
        metrics = run.last_records if quick else run.read_metrics
        records = (
            (run.metrics_file, metrics),
            (run.ledger_file, run.read_ledger),
            (run.environments_file, run.environments),
        )
        for path, read in records:
            wrong = _refused(read)
            harms = "the report and the run's figures leave out what is lost; weights and scores are as they were"
            yield path, wrong and Damage(path, wrong, harms, "bring it back from a copy", False)
        sound: list[Checkpoint] = []
        for folder in sorted(run.checkpoints.glob("step-" + "[0-9]" * 8)):
            checkpoint, wrong = _checkpoint(folder, identity, quick)
            if checkpoint and not wrong:
                sound.append(checkpoint)
            of = f"milestone {checkpoint.milestone}" if checkpoint and checkpoint.milestone else "this checkpoint"
            harms = f"{of} can't be scored, exported, forked or resumed from"
            mends = f"bring its files back from a copy, or: openlm train {name} --allow remake"
            yield folder, wrong and Damage(folder, wrong, harms, mends)
        yield from _gaps(run, experiment.labelled_milestones(), sound)


def _checkpoint(folder: Path, fingerprint: str, quick: bool) -> tuple[Checkpoint | None, str | None]:
    """What a checkpoint's folder says it is, and what is wrong with it."""
    if not (folder / COMPLETE).exists():
        return None, f"{folder} has no mark {COMPLETE}: it was not finished, or lost it"
    try:
        checkpoint = read_checkpoint(folder)
        if checkpoint.run_fingerprint != fingerprint:
            return checkpoint, f"{folder / INFO} is of another run"
    except (OpenLMError, OSError) as e:
        return None, str(e)
    return checkpoint, _refused(partial(verify, hashes=not quick), checkpoint)


def _gaps(run: RunFolder, milestones: Iterator[tuple[str, int]], sound: list[Checkpoint]) -> Found:
    """Milestones that training has passed and that are not there."""
    there, reached = {c.milestone for c in sound}, max((c.tokens for c in sound), default=0)
    for label, tokens in milestones:
        if tokens <= reached and label not in there:
            what = f"{run.path} was trained past {label}, which is not there"
            mends = f"bring its checkpoint back from a copy, or: openlm train {run.path.parent.name}"
            yield run.checkpoints, Damage(run.checkpoints / label, what, f"{label} can't be scored", mends, False)


def _scorecards(home: Home, quick: bool) -> Found:
    marks = ("items.parquet", CARD)
    for folder in sorted({path.parent for mark in marks for path in (home.root / "scorecards").rglob(mark)}):
        if is_set_aside(folder) or is_held(folder):
            continue
        again = f"openlm evaluate {folder.parent.parent.name}@{folder.name}"
        if folder.parent.parent.name == "models":
            again = f"openlm evaluate --checkpoint ... --name {folder.parent.name}"
        items, card = folder / "items.parquet", folder / CARD
        for path in [items, *sorted(folder.glob("tasks/*.parquet"))]:
            wrong = _refused(read_items, path) or (_refused(check_items, card) if path == items else None)
            yield path, wrong and Damage(path, wrong, "its scores can't be compared", f"{again} scores this again")
        wrong = _refused(_of_its_checkpoint, home, folder)
        yield card, wrong and Damage(card, wrong, "the report leaves it out", f"{again}; finished tasks are reused")


def _of_its_checkpoint(home: Home, folder: Path) -> None:
    """
    Raises:
        OpenLMError: the scorecard is not there, damaged, or of another checkpoint than the run has.
    """
    card = load_scorecard(folder / CARD)
    if card.milestone is None or card.run_version is None or card.step is None:
        return
    now = RunFolder(home.run(card.run, card.run_version)).milestone_at(card.step, card.milestone)
    how = card.precision, card.average_of_weights
    if now is not None and card.checkpoint_digest not in (milestone_digest(now, *how), scored_digest(now.digest, *how)):
        raise DataError(f"{folder / CARD} scores another checkpoint than {now.path}")


def _contamination(home: Home, quick: bool) -> Found:
    again = "openlm contamination RECIPE makes it again"
    for folder in _folders(home, "contamination/suites/*/*"):
        wrong = _refused(load_windows, folder)
        yield folder, wrong and Damage(folder, wrong, "no dataset is scanned for these items", again)
    harms = "which items a run has seen can't be told"
    scans = [path for folder in _folders(home, "contamination/datasets/*/*/*/*") for path in folder.glob("*.parquet")]
    joined = [path for folder in _folders(home, "scorecards/*/*/*") for path in folder.glob(JOINED)]
    for path in [*sorted(scans), *joined]:
        wrong = _refused(read_table, path)
        yield path, wrong and Damage(path, wrong, harms, again)


_CHECKS: tuple[Callable[[Home, bool], Found], ...] = (
    _raw,
    _tokenizers,
    _streams,
    _shards,
    _runs,
    _scorecards,
    _contamination,
)
