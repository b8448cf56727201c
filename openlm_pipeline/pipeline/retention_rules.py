"""Rules of retention: what in a home may go, why, and what can no longer be done then. Reads only, and asks no locks.

What decides depends on what is kept: runs that stay keep the shards that they were trained on, and shards that stay
keep their tokenizer. In doubt a thing stays.
"""

import contextlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, get_args

import yaml

from openlm_pipeline.checkpoints.folders import COMPLETE, Checkpoint, read_checkpoint, recipe_of
from openlm_pipeline.errors import DataError, MissingInputError
from openlm_pipeline.evaluation.items import read_items
from openlm_pipeline.evaluation.scored import milestone_digest, scored_digest
from openlm_pipeline.experiments import Evaluation
from openlm_pipeline.fingerprint import differences
from openlm_pipeline.runs.folder import RunFolder
from openlm_pipeline.shards.extended import EXTENDS, extended_version
from openlm_pipeline.shards.manifest import DATASET, MANIFEST, read_manifest, read_version
from openlm_pipeline.storage.files import TMP_SUFFIX, read_json
from openlm_pipeline.tokenization.documents import results
from openlm_pipeline.tokenizers.tokenizer import read_tokenizer_info
from openlm_pipeline.units import milestone_label

TRASH = ".trash-"
_UNFINISHED = ".tmp-"
_SUPERSEDED = re.compile(r"(.+)\.superseded-\d+")
_STEP = re.compile(r"step-\d{8}")
_ROOMS = ("tokenizers", "tokenized", "shards", "runs", "scorecards", "reports", ".sync")
_HOUR_SECONDS, _DAY_SECONDS = 3600.0, 86400.0


@dataclass(frozen=True)
class Retention:
    """What to keep."""

    superseded_days: float = 30
    """Days for which what was set aside stays."""
    unfinished_hours: float = 24
    """Hours without a write after which an unfinished file or folder counts as left by a dead process."""
    superseded_runs: bool = False
    """Runs that were set aside go with their milestones, which otherwise stay for ever."""
    token_streams: bool = False
    """Token streams go whose shards are complete. The next job that uses the dataset makes them again."""


@dataclass(frozen=True)
class GcEntry:
    """A file or folder that may go."""

    path: Path
    bytes: int
    why: str
    consequence: str
    """What can no longer be done without it."""
    lock: Path | None = None
    """Folder whose lock its writers hold; None where there are none."""


@dataclass(frozen=True)
class Kept:
    """Something that looks as if it could go, and stays."""

    path: Path
    bytes: int
    why: str


def _tree_files(path: Path) -> Iterator[os.stat_result]:
    yield path.lstat()
    for folder, _, names in os.walk(path):
        for name in names:
            with contextlib.suppress(FileNotFoundError):  # its writer is alive
                yield Path(folder, name).lstat()


def _bytes(path: Path) -> int:
    return sum(s.st_size for s in _tree_files(path))


def _base(path: Path) -> Path | None:
    """What a folder was set aside from."""
    match = _SUPERSEDED.fullmatch(path.name)
    return path.with_name(match[1]) if match else None


def _checkpoints(run: Path) -> list[Checkpoint]:
    """The complete checkpoints of a run folder with a sound description, whoever's they are."""
    found = []
    for path in sorted((run / "checkpoints").glob("step-*")):
        if _STEP.fullmatch(path.name) and not path.is_symlink():
            with contextlib.suppress(DataError, MissingInputError):
                found.append(read_checkpoint(path))
    return found


def _read(path: Path) -> Any:
    """A JSON object, or an empty one where there is none that can be read."""
    with contextlib.suppress(DataError, MissingInputError):
        value = read_json(path)
        return value if isinstance(value, dict) else {}
    return {}


def _tokenizer(folder: Path) -> str | None:
    """sha256 of a finished tokenizer."""
    with contextlib.suppress(DataError, MissingInputError):
        return read_tokenizer_info(folder).sha256
    return None


@dataclass
class Scan:
    """One look at a home. What depends on what decides the order: runs use shards, shards use tokenizers."""

    root: Path
    retention: Retention
    now: float
    entries: list[GcEntry] = field(default_factory=list)
    kept: list[Kept] = field(default_factory=list)
    _manifests: dict[str, Path] = field(default_factory=dict)
    """sha256 of a manifest -> a run that stays and was trained on it."""
    _tokenizers: dict[str, Path] = field(default_factory=dict)
    """sha256 of a tokenizer -> shards that stay and were made with it."""

    def everything(self) -> "Scan":
        for run in self._folders("runs", 2):
            self._run(run)
        for shards in self._folders("shards", 2):
            self._shards(shards)
        for tokenizer in self._folders("tokenizers", 1):
            self._tokenizer(tokenizer)
        if self.retention.token_streams:
            for streams in self._folders("tokenized", 2):
                self._streams(streams)
        aside = {under for run in self._folders("runs", 2) if _base(run) for under in _filed_under(run)}
        aside -= {under for run in self._folders("runs", 2) if not _base(run) for under in _filed_under(run)}
        for scorecard in self._folders("scorecards", 3):
            self._scores(scorecard, aside)
        for room in _ROOMS:
            self._leftovers(room)
        return self

    @cached_property
    def _extended(self) -> dict[str, Path]:
        """Content of shards -> other shards that extend them."""
        found = {
            shards: _read(shards / DATASET).get("identity", {}).get(EXTENDS) for shards in self._folders("shards", 2)
        }
        return {extends["content"]: shards for shards, extends in found.items() if extends}

    def _folders(self, room: str, depth: int) -> list[Path]:
        """Real folders so many levels below a room."""
        level = [self.root / room]
        for _ in range(depth):
            level = [
                child
                for folder in level
                if folder.is_dir() and not folder.is_symlink()
                for child in sorted(folder.iterdir())
                if not child.name.startswith(".")
            ]
        return [folder for folder in level if folder.is_dir() and not folder.is_symlink()]

    def _add(self, path: Path, why: str, consequence: str, lock: Path | None = None) -> None:
        self.entries.append(GcEntry(path, _bytes(path), why, consequence, lock))

    def _keep(self, path: Path, why: str) -> None:
        self.kept.append(Kept(path, _bytes(path), why))

    def _aside(self, path: Path, replaced: bool) -> str | None:
        """Why a folder that was set aside may go; else it is noted as kept. A rename sets the time of change."""
        days = (self.now - path.lstat().st_ctime) / _DAY_SECONDS
        base = _base(path)
        if not replaced:
            self._keep(path, f"nothing has taken its place at {base.name} yet")
        elif days < self.retention.superseded_days:
            self._keep(path, f"set aside {days:.0f} days ago; {self.retention.superseded_days:g} are kept")
        else:
            return f"set aside {days:.0f} days ago, replaced by {base.name}"
        return None

    def _run(self, folder: Path) -> None:
        checkpoints = _checkpoints(folder)
        milestones = [c for c in checkpoints if c.milestone]
        rotating = [c for c in checkpoints if c.rotates]
        lock = folder.parent / f".{folder.name}"
        if base := _base(folder):
            lock = None
            why = self._aside(folder, (base / "run.json").exists())
            if why and (self.retention.superseded_runs or not milestones):
                changed = differences(_read(folder / "run.json").get("identity", {}), RunFolder(base).identity)
                names = ", ".join(c.milestone for c in milestones)
                lost = f"its milestones {names} can't be scored, exported or forked from" if names else ""
                self._add(folder, f"{why}, which differs: {'; '.join(changed)}", lost or "it can't be resumed")
                return
            if why:
                self._keep(folder, f"it holds {len(milestones)} milestones; superseded_runs lets them go")
            due = rotating if why else []
            why = "rotating checkpoint of a run that was set aside"
        else:
            wanted = self._milestones(folder)
            due = rotating if wanted and wanted <= {c.milestone for c in milestones} else []
            why = "rotating checkpoint of a finished run"
            for path in sorted((folder / "checkpoints").glob("step-*")):
                if (of := _base(path)) and path.is_dir() and not path.is_symlink():
                    self._damaged(path, of, lock)
        for checkpoint in due:
            lost = "if the milestone after it is damaged, it is trained again from the milestone before"
            self._add(checkpoint.path, why, lost, lock)
        if (folder / "run.json").exists():  # one that can't be read ends the plan: what it used is unknown
            for data in RunFolder(folder).identity.get("data", []):
                self._manifests[data["manifest_sha256"]] = folder

    def _damaged(self, path: Path, of: Path, lock: Path) -> None:
        if why := self._aside(path, (of / COMPLETE).exists()):
            self._add(path, f"damaged checkpoint, {why}", "what is sound in it can't be looked at", lock)

    def _milestones(self, folder: Path) -> set[str]:
        """Labels of the milestones that a run is to have; empty if it does not say."""
        try:
            recorded = yaml.safe_load(recipe_of(folder).read_text())
            return {milestone_label(tokens) for tokens in recorded["milestones"]}
        except (OSError, yaml.YAMLError, KeyError, TypeError, AttributeError, DataError):
            return set()

    def _shards(self, folder: Path) -> None:
        info = _read(folder / DATASET)
        if base := _base(folder):
            try:
                own = read_version(folder) if (folder / MANIFEST).exists() else ""
                before = info.get("identity", {}).get(EXTENDS, {}).get("content")
                used_by = self._manifests.get(extended_version(before, own) if before else own)
            except DataError as e:
                self._keep(folder, f"it can't be read: {e}")
                return
            if used_by:
                self._keep(folder, f"run {used_by.relative_to(self.root)} was trained on it")
            elif later := self._extended.get(own):
                self._keep(folder, f"shards {later.relative_to(self.root)} extend it")
            elif why := self._aside(folder, (base / MANIFEST).exists()):
                changed = differences(info.get("identity", {}), _read(base / DATASET).get("identity", {}))
                self._add(
                    folder,
                    f"{why}, which differs: {'; '.join(changed)}",
                    "no run here was trained on it; the raw files and the old settings make it again",
                )
                return
        if sha256 := info.get("tokenizer", {}).get("sha256"):
            self._tokenizers[sha256] = folder

    def _tokenizer(self, folder: Path) -> None:
        base = _base(folder)
        if base is None:
            return
        sha256 = _tokenizer(folder)
        if sha256 is None:
            self._keep(folder, "it is damaged, so that what it was used for is unknown")
        elif used_by := self._tokenizers.get(sha256):
            self._keep(folder, f"shards {used_by.relative_to(self.root)} were made with it")
        elif why := self._aside(folder, _tokenizer(base) is not None):
            self._add(folder, why, "no shards here were made with it; the old settings make it again")

    def _streams(self, folder: Path) -> None:
        """Stage 1 of a dataset, if stage 2 is done with exactly this."""
        shards = self.root / "shards" / folder.parent.name / folder.name
        recorded = _read(shards / DATASET).get("identity", {}).get("files", {})
        try:
            streams = results(folder)
        except (TypeError, DataError) as e:
            self._keep(folder, f"it can't be read: {e}")
            return
        if not streams or any(folder.rglob("*.part-*")) or {s.name: s.version for s in streams} != recorded:
            self._keep(folder, "its shards are not made yet, or from other streams")
        elif lacking := self._lacking(shards):
            self._keep(folder, f"shard {lacking} is not whole here")
        else:
            names = f"{len(streams)} raw files" if len(streams) > 1 else f"raw file {streams[0].name}"
            self._add(
                folder,
                f"its shards are complete: {shards.relative_to(self.root)}",
                f"the next job or `openlm tokenize` of this dataset must read {names} and tokenize again",
                folder,
            )

    def _lacking(self, shards: Path) -> str | None:
        """The first shard that is not here with the manifest's size; the manifest itself if there is none."""
        try:
            entries = read_manifest(shards)
        except (DataError, MissingInputError):
            return MANIFEST
        for entry in entries:
            path = shards / f"{entry.shard}.tar"
            if not path.is_file() or path.stat().st_size != entry.bytes:
                return path.name
        return None

    def _scores(self, folder: Path, aside: set[str]) -> None:
        caches = sorted((folder / "tasks").glob("*.parquet"))
        if caches and not (folder / "tasks").is_symlink() and all(_scored(path) in aside for path in caches):
            lost = "if that run is put back, its tasks are scored again; items.parquet stays"
            self._add(folder / "tasks", "scores by task of a run that was set aside", lost, folder)

    def _leftovers(self, room: str) -> None:
        """What killed processes left, outside of what goes anyway."""
        going = {e.path for e in self.entries}
        top = self.root / room
        if top.is_symlink():
            self._keep(top, "it is a symbolic link, which is not followed")
            return
        for folder, folders, names in os.walk(top):
            here = Path(folder)
            left = [n for n in folders if n.startswith((TRASH, _UNFINISHED))]
            folders[:] = sorted(n for n in folders if n not in left and here / n not in going)
            left += [n for n in names if n.startswith(TRASH) or n.endswith(TMP_SUFFIX)]
            for path in (here / n for n in left):
                if path.is_symlink():
                    continue
                if path.name.startswith(TRASH):
                    self._add(path, "left by an `openlm gc` that was stopped", "nothing")
                elif (
                    self.now - max(s.st_mtime for s in _tree_files(path))
                    >= self.retention.unfinished_hours * _HOUR_SECONDS
                ):
                    self._add(path, "unfinished, left by a process that died", "nothing", self._writer(path))

    def _writer(self, path: Path) -> Path | None:
        """Folder whose lock the writer of an unfinished file holds; None where writers hold none."""
        room, *names = path.relative_to(self.root).parts
        if room in ("runs", "shards") and len(names) > 2 and not _SUPERSEDED.fullmatch(names[1]):
            return self.root / room / names[0] / f".{names[1]}"
        depth = {"tokenized": 2, "scorecards": 3}.get(room, len(names))
        return self.root.joinpath(room, *names[:depth]) if depth < len(names) else None


def _filed_under(run: Path) -> Iterator[str]:
    """What scores of a run's checkpoints may be filed under, but for those of averages."""
    for checkpoint in _checkpoints(run):
        for precision in get_args(Evaluation.model_fields["precision"].annotation):
            yield milestone_digest(checkpoint, precision)
            yield scored_digest(checkpoint.digest, precision)  # as an earlier release did


def _scored(path: Path) -> str | None:
    """Digest of the checkpoint that a task's items are of."""
    with contextlib.suppress(DataError):
        return read_items(path)[1].get("checkpoint")
    return None
