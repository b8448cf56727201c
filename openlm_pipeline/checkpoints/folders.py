"""Checkpoints of a run: folders `step-XXXXXXXX` that are verified whole or not seen.

A checkpoint is written under `.tmp-step-XXXXXXXX`, described in `checkpoint.json` (run fingerprint, step, tokens,
digest of the weights, sha256 of every file and of the description itself), renamed, and marked with an empty `COMPLETE`
last. A reader trusts a folder only if `COMPLETE` is there, the run is its own and, before loading, every file has its
recorded hash.
"""

import shutil
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from openlm_pipeline.errors import DataError, IdentityError, MissingInputError
from openlm_pipeline.fingerprint import fingerprint
from openlm_pipeline.models.config import ModelConfig
from openlm_pipeline.result import refusal, refuse
from openlm_pipeline.storage.copies import describe_file
from openlm_pipeline.storage.files import (
    check_inside,
    make_folder,
    read_json,
    read_sealed,
    rename,
    set_aside,
    sha256_file,
    write_json,
    write_text,
)
from openlm_pipeline.strict import explain

INFO = "checkpoint.json"
COMPLETE = "COMPLETE"
MODEL_CONFIG = "model_config.json"
RECIPE_SHA256 = "experiment_sha256"
"""What `run.json` says of the run's `experiment.yaml`."""
_UNFINISHED = ".tmp-"
KEEP_DAMAGED = "To keep it, bring back its files from a copy"
"""The way on from a damaged milestone without training it again."""


@dataclass(frozen=True)
class Checkpoint:
    """What `checkpoint.json` says, and where it stands."""

    path: Path
    run_fingerprint: str
    step: int
    tokens: int
    milestone: str | None
    """Label of the milestone it is, which pins it; None for a rotating checkpoint."""
    files: dict[str, dict[str, Any]]
    """`{"bytes", "sha256"}` of each file."""
    metrics: dict[str, float] = field(default_factory=dict)
    weights_digest: str | None = None
    """Digest of the weights (`checkpoints.weights_digest`); None where an earlier release wrote the checkpoint."""
    before_milestone: str | None = None
    """Label of the milestone that it is kept for, a few steps before (`execution.keep_before_milestone`)."""

    @property
    def rotates(self) -> bool:
        """Whether newer ones take its place."""
        return self.milestone is None and self.before_milestone is None

    @property
    def digest(self) -> str:
        """Content hash over all files. Equal weights that were saved by other numbers of processes have another."""
        return fingerprint({"files": self.files, "run": self.run_fingerprint, "step": self.step})


def folder_name(step: int) -> str:
    return f"step-{step:08d}"


def unfinished(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step is written before it is one."""
    return folder / f"{_UNFINISHED}{folder_name(step)}"


def clear_unfinished(folder: Path) -> None:
    """Make the folder, and remove what killed or failed writers left; for the one process that writes there."""
    make_folder(folder)
    for left in folder.glob(f"{_UNFINISHED}step-*"):
        shutil.rmtree(left)


def commit(
    tmp: Path,
    run_fingerprint: str,
    step: int,
    tokens: int,
    milestone: str | None,
    metrics: dict[str, float],
    hashed: dict[str, dict[str, Any]],
    weights_digest: str | None = None,
    before_milestone: str | None = None,
) -> Checkpoint:
    """Turn the written folder `tmp` into a checkpoint beside it.

    Args:
        hashed: `describe_file` of some of its files; the others are read here.
    """
    names = sorted(p.relative_to(tmp).as_posix() for p in tmp.rglob("*") if p.is_file())
    files = {name: hashed.get(name) or describe_file(tmp / name) for name in names}
    path = tmp.parent / folder_name(step)
    of = path, run_fingerprint, step, tokens, milestone
    checkpoint = Checkpoint(*of, files, metrics, weights_digest, before_milestone)
    _write_info(tmp, checkpoint)
    publish(tmp, path)
    return checkpoint


def publish(tmp: Path, path: Path) -> None:
    """Put a folder that has all of a checkpoint but its mark in its place, and mark it."""
    if path.exists():
        _delete(path)
    rename(tmp, path)
    write_text(path / COMPLETE, "")


def _delete(path: Path) -> None:
    """Remove a checkpoint, its mark first."""
    (path / COMPLETE).unlink(missing_ok=True)
    shutil.rmtree(path)


def _write_info(folder: Path, checkpoint: Checkpoint) -> None:
    info = asdict(checkpoint)
    del info["path"]
    for name in ("weights_digest", "before_milestone"):
        if info[name] is None:
            del info[name]
    write_json(folder / INFO, {**info, "sha256": fingerprint(info)})


def promote(checkpoint: Checkpoint, milestone: str, metrics: dict[str, float]) -> Checkpoint:
    """Make a rotating checkpoint a milestone."""
    pinned = Checkpoint(**{**vars(checkpoint), "milestone": milestone, "metrics": metrics})
    _write_info(checkpoint.path, pinned)
    return pinned


def read_checkpoint(path: Path) -> Checkpoint:
    """The description of one checkpoint folder, its files not yet verified.

    Raises:
        MissingInputError: there is no complete checkpoint.
        DataError: its description is damaged.
    """
    if not (path / COMPLETE).exists():
        raise MissingInputError(f"there is no complete checkpoint at {path}")
    return checked_info(read_json(path / INFO), path, str(path / INFO))


def checked_info(info: Any, path: Path, name: str) -> Checkpoint:
    """The checkpoint at `path` that the contents of its `checkpoint.json` describe; errors call that file `name`.

    Raises:
        DataError: they are damaged.
    """
    try:
        recorded = info.pop("sha256", None)
        if recorded != fingerprint(info):
            raise DataError(f"{name} does not have its recorded sha256: it is damaged")
        checkpoint = Checkpoint(path=path, **info)
        check_inside(checkpoint.files, name)
        return checkpoint
    except (TypeError, AttributeError, ValueError) as e:  # ValueError: half a character
        raise DataError(f"{name} is not a checkpoint's description: {e}") from e


def recorded_config(folder: Path) -> ModelConfig:
    """The model that a checkpoint's folder says that it holds.

    Raises:
        MissingInputError, DataError: it does not say so, or what it says is no model's.
    """
    recorded = read_json(folder / MODEL_CONFIG)
    try:
        return ModelConfig.model_validate(recorded)
    except ValidationError as e:
        raise DataError(str(explain(e, str(folder / MODEL_CONFIG)))) from e


def check_layers(where: object, config: ModelConfig, tensors: Collection[str]) -> None:
    """
    Raises:
        DataError: there are fewer tensors than the model has layers; to build all of many takes for ever.
    """
    if config.n_layers > len(tensors):
        raise DataError(f"{where} has {len(tensors)} tensors, too few for a model of {config.n_layers:,} layers")


def recipe_of(run: Path) -> Path | None:
    """`experiment.yaml` of a run folder, the resolved recipe; None where there is none.

    Raises:
        DataError: it is not the one that `run.json` was written with.
    """
    path, record = run / "experiment.yaml", run / "run.json"
    recorded = read_sealed(record).get(RECIPE_SHA256) if record.exists() else None
    if recorded and (not path.is_file() or sha256_file(path) != recorded):
        raise DataError(f"{path} is not the one that {record} was written with; `openlm train` writes it again")
    return path if path.is_file() else None


def list_checkpoints(folder: Path, run_fingerprint: str, warn: Callable[[str], None]) -> list[Checkpoint]:
    """Complete checkpoints of this run by step. One with a damaged description is reported and passed over.

    Raises:
        IdentityError: a checkpoint in the folder is another run's.
    """
    found = []
    for path in sorted(folder.glob("step-" + "[0-9]" * 8)):
        if not (path / COMPLETE).exists():
            continue
        try:
            checkpoint = read_checkpoint(path)
        except (DataError, MissingInputError) as e:
            warn(f"checkpoint {path.name} is passed over: {e}")
            continue
        if checkpoint.run_fingerprint != run_fingerprint:
            raise IdentityError(f"{path} is a checkpoint of another run; move it out of this run's folder")
        found.append(checkpoint)
    return found


def verify(checkpoint: Checkpoint, *, hashes: bool = True, rank: int = 0, world_size: int = 1) -> None:
    """Compare every file with its recorded size and, unless told not to, its hash.

    Args:
        rank, world_size: of the processes that share out the hashes; what a rank wrote itself comes to it where as many
            wrote the checkpoint.

    Raises:
        DataError: names the first file that is missing or differs.
    """
    paths = {checkpoint.path / name: recorded for name, recorded in checkpoint.files.items()}
    for path, recorded in paths.items():
        if not path.is_file() or path.stat().st_size != recorded["bytes"]:
            raise DataError(f"checkpoint file {path} is missing or has the wrong size")
    if not hashes:
        return
    mine = [path for i, path in enumerate(paths) if i % world_size == rank]
    with ThreadPoolExecutor() as pool:  # hashing gives the interpreter's lock back
        for path, found in zip(mine, pool.map(sha256_file, mine)):
            if found != paths[path]["sha256"]:
                raise DataError(f"checkpoint file {path} does not have its recorded sha256: it is damaged")


def put_away_damaged(
    checkpoint: Checkpoint, damage: DataError, warn: Callable[[str], None], allow: Collection[str] = ()
) -> None:
    """Set a damaged checkpoint aside and say so; nothing counts on it any more: neither a milestone nor the number of
    checkpoints that are kept.

    Args:
        allow: consents; a damaged milestone is set aside only with `remake`.

    Raises:
        ConsentError: it is a milestone.
    """
    if checkpoint.milestone:
        what = f"milestone {checkpoint.milestone} is damaged: {damage}"
        refuse([refusal("remake", what, KEEP_DAMAGED)], allow)
    warn(f"{damage}. Falling back to an earlier checkpoint; it is now {set_aside(checkpoint.path).name}")


def rotate(checkpoints: list[Checkpoint], keep: int, in_use: Collection[int] = ()) -> None:
    """Delete all but the newest `keep` checkpoints that rotate; the mark goes first.

    Args:
        in_use: steps whose checkpoints stay for now, because they are being copied.
    """
    for checkpoint in outdated(checkpoints, keep):
        if checkpoint.step not in in_use:
            _delete(checkpoint.path)


def outdated(checkpoints: list[Checkpoint], keep: int) -> list[Checkpoint]:
    """Those of the checkpoints, by step, that rotate, without the newest `keep` of them."""
    return [c for c in checkpoints if c.rotates][:-keep]
