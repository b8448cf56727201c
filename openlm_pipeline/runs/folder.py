"""The run folder: who it belongs to, its metrics, and how its last process ended.

`run.json` (identity), `experiment.yaml` (the resolved experiment), `metrics.jsonl`, `ledger.jsonl` (what its time went
into, see `ledger`), `outcome.json`, `checkpoints/`; on a GPU `attention.json`, the order of attention's kernels by kind
of GPU.
"""

import json
import os
import time
import zlib
from collections.abc import Collection, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import orjson
import yaml

from openlm_pipeline.checkpoints.folders import (
    COMPLETE,
    RECIPE_SHA256,
    Checkpoint,
    folder_name,
    list_checkpoints,
    read_checkpoint,
    recipe_of,
)
from openlm_pipeline.errors import DataError, IdentityError, MissingInputError, TrainingError, disk_trouble
from openlm_pipeline.experiments import Experiment, load_experiment
from openlm_pipeline.fingerprint import Tree, differences, fingerprint
from openlm_pipeline.result import Finding, refusal, refuse
from openlm_pipeline.runs.identity import ends_later, extension_refusal, settled
from openlm_pipeline.storage.files import (
    folder_lock,
    read_sealed,
    set_aside,
    sha256_file,
    sync_folder,
    write_sealed,
    write_text,
)

WANDB_URL = "wandb_url.txt"
"""File of the run folder with the address of its page, once wandb gave it one; there is none offline."""

_CRC, _CRC_LENGTH = b', "crc32": "', 10
"""What begins the end of each line of metrics and ledger, and the length of the rest: the line's sum, `"` and `}`."""
_LEDGER_BYTES = "ledger_bytes"
_SKIPPED = b'"skipped":'
_MOST_RECORDS = 10_000
"""Twice as many losses of a kind are in memory at the most, 2.7 kB each."""


@dataclass(frozen=True)
class RunFolder:
    """Paths and records of one run."""

    path: Path

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def metrics_file(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def ledger_file(self) -> Path:
        return self.path / "ledger.jsonl"

    @property
    def environments_file(self) -> Path:
        return self.path / "environments.jsonl"

    def add_environment(self, environment: dict[str, Any]) -> str:
        """Note what a process trains with, unless it is there; the digest by which the ledger names it."""
        digest = fingerprint(environment)
        if digest not in (found := self.environments()):
            lines = [orjson.dumps({"sha256": of, **each}) for of, each in (found | {digest: environment}).items()]
            write_text(self.environments_file, "".join(f"{line.decode()}\n" for line in lines))
        return digest

    def environments(self) -> dict[str, dict[str, Any]]:
        """What processes of the run trained with, by digest.

        Raises:
            DataError: the file is damaged.
        """
        found: dict[str, dict[str, Any]] = {}
        if self.environments_file.exists():
            for line in self.environments_file.read_bytes().splitlines():
                record = _parsed(line)
                digest = record.pop("sha256", None) if isinstance(record, dict) else None
                if digest is None or fingerprint(record) != digest:
                    what = f"{self.environments_file} is damaged: {line[:40]!r}... is not a line as written"
                    raise DataError(f"{what}. Bring it back from a copy, or delete this line")
                found[digest] = record
        return found

    @property
    def stop_file(self) -> Path:
        """There once somebody asked the trainer to stop, until it is submitted again."""
        return self.path / "launch" / "stop"

    @property
    def lock_folder(self) -> Path:
        """Beside the folder, which `claim` may set aside."""
        return self.path.parent / f".{self.path.name}"

    @property
    def attention_file(self) -> Path:
        return self.path / "attention.json"

    @property
    def wandb_file(self) -> Path:
        """Holds the id of the run at Weights & Biases."""
        return self.path / "wandb_id.txt"

    @property
    def experiment_file(self) -> Path:
        return self.path / "experiment.yaml"

    def experiment(self) -> Experiment:
        """The resolved experiment of the run.

        Raises:
            OpenLMError: it is not there, or damaged.
        """
        return load_experiment(str(recipe_of(self.path) or self.experiment_file))

    @property
    def _record(self) -> dict[str, Any] | None:
        """What `claim` wrote; None where nobody did."""
        return self._claimed() if (self.path / "run.json").exists() else None

    def _claimed(self) -> dict[str, Any]:
        record = read_sealed(path := self.path / "run.json")
        if not {"fingerprint", "identity"} <= record.keys():
            raise DataError(f"{path} is damaged: it does not say which run this is. Move its folder away")
        return record

    @property
    def fingerprint(self) -> str:
        return self._claimed()["fingerprint"]

    @property
    def identity(self) -> Tree:
        return self._claimed()["identity"]

    def saved(self) -> list[Checkpoint]:
        """Its complete checkpoints by step, damaged descriptions passed over; none where it was never claimed."""
        record = self._record
        return list_checkpoints(self.checkpoints, record["fingerprint"], warn=lambda _: None) if record else []

    def milestone_at(self, step: int, label: str) -> Checkpoint | None:
        """The milestone, if it is complete, at its step; for those who ask again and again."""
        path = self.checkpoints / folder_name(step)
        if not (path / COMPLETE).exists():
            return None
        with suppress(DataError, MissingInputError):  # it is replaced now, or damaged: `saved` passes over it too
            found = read_checkpoint(path)
            return found if (found.milestone, found.run_fingerprint) == (label, self.fingerprint) else None
        return None

    def lock(self) -> AbstractContextManager[None]:
        """Held by the one process that may train this run, for its lifetime.

        Raises:
            BusyError: on entering, where another process holds it.
        """
        return folder_lock(self.lock_folder, "training")

    def belongs_to(self, identity: Tree) -> bool:
        """Whether the folder is free or is that run's."""
        return self._record is None or self._recorded(identity) == identity

    def _recorded(self, identity: Tree) -> Tree:
        """The identity in the folder, to compare with `identity`: without what may change as a run goes, and with the
        later end of its schedule that it was given consent to."""
        record = self._record
        recorded, horizon = settled(record["identity"]), identity.get("training", {}).get("horizon")
        if horizon in record.get("extended", ()):
            recorded["training"]["horizon"] = horizon
        return recorded

    @property
    def has_begun(self) -> bool:
        """Whether anything was trained here: until then the folder is nobody's for good."""
        return self.metrics_file.exists() or any(self.checkpoints.glob("step-*"))

    def differences(self, identity: Tree) -> list[str]:
        """How the run in the folder differs from `identity`, a line per field."""
        return differences(self._recorded(identity), identity)

    def extension_refusal(self, experiment: Experiment, identity: Tree) -> str | None:
        """Why the run's schedule is not simply longer now, see `identity.extension_refusal`."""
        return extension_refusal(experiment, self._recorded(identity), identity)

    def superseded_by(self, experiment: Experiment, identity: Tree, allow: Collection[str] = ()) -> Finding | None:
        """What `claim` would set aside: another run that has begun; the finding names each field that differs.

        Args:
            allow: consents; with `extend` a run whose schedule has ended is extended.

        Raises:
            IdentityError: it is this run with a schedule that ended before the new last milestone.
        """
        if self.belongs_to(identity) or not self.has_begun:
            return None
        if "extend" in allow and ends_later(self._recorded(identity), identity):
            return None
        if impossible := self.extension_refusal(experiment, identity):
            raise IdentityError(impossible)
        what = "\n  ".join([f"{self.path} holds another run. What differs:", *self.differences(identity)])
        return refusal("supersede", what, "To keep it, give the recipe another `version` or name")

    def claim(self, experiment: Experiment, identity: Tree, allow: Collection[str] = ()) -> list[str]:
        """Make the folder this run's, and record the resolved experiment.

        Args:
            allow: consents; `supersede` sets the folder of another run aside instead of refusing it, and `extend`
                gives this run a later end of its schedule, which is recorded.

        Returns:
            How the run that was set aside differed.

        Raises:
            ConsentError: the folder is another run's; the message names each field that differs.
            IdentityError: it is this run with a schedule that ended before the new last milestone.
        """
        changed: list[str] = []
        if found := self.superseded_by(experiment, identity, allow):
            refuse([found], allow)
            changed = self.differences(identity)
            set_aside(self.path)
        extended: list[int] = []
        if (before := self._record) and (self.has_begun or self.belongs_to(identity)):
            extended = before.get("extended", [])
            if not self.belongs_to(identity):  # it has the consent to be extended
                extended.append(experiment.schedule_horizon())
            identity = before["identity"]  # its checkpoints have this fingerprint
        write_text(self.experiment_file, yaml.safe_dump(experiment.model_dump(mode="json"), sort_keys=False))
        record = {"name": experiment.name, "version": experiment.version, "fingerprint": fingerprint(identity)}
        record |= {RECIPE_SHA256: sha256_file(self.experiment_file)}
        record |= {"extended": extended} if extended else {}
        write_sealed(self.path / "run.json", {**record, "identity": identity})
        vars(self).pop("_seed", None)
        return changed

    @cached_property
    def _seed(self) -> int:
        """What the sums of the lines of its files begin with, so that another run's lines are none of its."""
        record = self._record
        return zlib.crc32(record["fingerprint"].encode()) if record else 0

    def append_metrics(self, record: dict[str, Any]) -> None:
        """
        Raises:
            TrainingError: there is no room for it, or it can't be written.
        """
        self._append(self.metrics_file, record)

    def append_ledger(self, event: str, **what: Any) -> None:
        """As `append_metrics`; the event has its place among the records of `metrics.jsonl`, whatever clocks say.

        Raises:
            TrainingError: as `append_metrics`.
            DataError: at a start, some of both is lost.
        """
        if event == "start":
            self._check_metrics()  # once there are more, nobody could tell that some were lost
        self.sync_metrics()  # the ledger promises that they are there
        self._append(self.ledger_file, {"event": event, **what, "metrics_bytes": _size(self.metrics_file)})
        _sync(self.ledger_file)  # as `outcome.json` does of the ledger

    def sync_metrics(self) -> None:
        """Have all records so far reach the disk, before a checkpoint counts that says that they are not made again.

        Raises:
            TrainingError: they can't.
        """
        if self.metrics_file.exists():
            _sync(self.metrics_file)

    def _append(self, path: Path, record: dict[str, Any]) -> None:
        line = json.dumps({**record, "time": round(time.time(), 3)})
        line = f'{line[:-1]}, "crc32": "{zlib.crc32(line.encode(), self._seed):08x}"}}\n'
        with _writing(path), path.open("ab+") as f:
            if f.tell():
                f.seek(-1, os.SEEK_END)
                if f.read(1) != b"\n":  # a killed process left half a line
                    line = "\n" + line
            f.write(line.encode())

    def read_ledger(self) -> list[dict[str, Any]]:
        """The events in the order written; none where an earlier release trained.

        Raises:
            DataError: it is damaged, or shorter than `outcome.json` says.
        """
        _check_size(self.ledger_file, (self.read_outcome() or {}).get(_LEDGER_BYTES, 0), "outcome.json")
        if not self.ledger_file.exists():
            return []
        with self.ledger_file.open("rb") as f:
            return [event for _, event in self._sound(self.ledger_file, f)]

    def last_records(self, num_bytes: int = 1 << 16) -> list[dict[str, Any]]:
        """The records in the last bytes of `metrics.jsonl`; errors as of `records`."""
        self._check_metrics()
        if (start := _size(self.metrics_file) - num_bytes) <= 0:
            return self.new_metrics(0)[0]
        with self.metrics_file.open("rb") as f:
            f.seek(start)
            return self.new_metrics(start + len(f.readline()))[0]

    def _check_metrics(self) -> None:
        if ledger := self.read_ledger():
            _check_size(self.metrics_file, ledger[-1]["metrics_bytes"], self.ledger_file.name)

    def _sound(
        self, path: Path, lines: Iterable[bytes], place: int = 0, holding: bytes = b""
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        """Records, each with the bytes before its line, of a file whose writer may have been killed inside a line; of
        lines that hold some bytes alone.

        Raises:
            DataError: a whole line is not what this run wrote; those of earlier releases have no sums.
        """
        for line in lines:
            if holding not in line:
                place += len(line)
                continue
            text, found, crc = line.rstrip().rpartition(_CRC)
            if has_sum := bool(found) and len(crc) == _CRC_LENGTH:
                text += b"}"
                if f"{zlib.crc32(text, self._seed):08x}".encode() != crc[:8]:
                    raise DataError(
                        f"{path} is damaged, or another run's: {text[:40]!r}... is not a line as written. Bring "
                        "it back from a copy, or delete this line"
                    )
            if (record := _parsed(text if has_sum else line)) is not None:
                yield place, record
            place += len(line)

    def new_metrics(self, offset: int) -> tuple[list[dict[str, Any]], int]:
        """The records of the whole lines after byte `offset`, as they were written, and where to continue from."""
        if not self.metrics_file.exists():
            return [], offset
        with self.metrics_file.open("rb") as f:
            f.seek(offset)
            lines = f.read()
        whole = lines[: lines.rfind(b"\n") + 1]
        return [r for _, r in self._sound(self.metrics_file, whole.splitlines())], offset + len(whole)

    def read_metrics(self) -> list[dict[str, Any]]:
        """Records of losses by step, those of training and of validation; see `Losses`."""
        losses = Losses()
        for _, record in self.records():
            losses.add(record)
        return losses.records()

    def records(self, place: int = 0, holding: bytes = b"") -> Iterator[tuple[int, dict[str, Any]]]:
        """What `metrics.jsonl` has from the byte `place` on, one at a time, each with the byte where its line begins.

        Args:
            holding: of lines with these bytes alone, which is twenty times as fast where few have them.

        Raises:
            DataError: it is damaged, or shorter than the ledger says.
        """
        self._check_metrics()
        if self.metrics_file.exists():
            with self.metrics_file.open("rb") as f:
                f.seek(place)
                yield from self._sound(self.metrics_file, f, place, holding)

    def metrics_bytes(self) -> tuple[int, int]:
        """Of `metrics.jsonl`: up to the end of its last whole line, as a trainer may be at the next, and in all."""
        if not (size := _size(self.metrics_file)):
            return 0, 0
        with self.metrics_file.open("rb") as f:
            begin = f.seek(max(0, size - (1 << 16)))
            return begin + f.read(size - begin).rfind(b"\n") + 1, size

    def skipped_steps(self) -> list[dict[str, Any]]:
        """A record of each time that a step was left out, in the order written."""
        return [r for _, r in self.records(holding=_SKIPPED) if "skipped" in r]

    def write_outcome(
        self, status: Literal["completed", "preempted", "failed"], step: int, tokens: int, **why: str
    ) -> None:
        """Record how a training process ended; launchers read this, not exit codes. Any rank may do it."""
        record = {"status": status, "step": step, "tokens": tokens, **why}
        record |= {_LEDGER_BYTES: size} if (size := _size(self.ledger_file)) else {}
        write_sealed(self.path / "outcome.json", record, shared=True)

    def read_outcome(self) -> dict[str, Any] | None:
        path = self.path / "outcome.json"
        return read_sealed(path) if path.exists() else None

    def clear_outcome(self) -> None:
        for path in self.path.glob("outcome.json*"):
            path.unlink(missing_ok=True)


class Losses:
    """The losses of a run as its records are read, in bounded memory.

    A resumed run repeats steps; the last record of a step and kind stands. Of very many, the last of each few
    neighbouring steps stands.
    """

    def __init__(self) -> None:
        self._kinds: list[dict[int, dict[str, Any]]] = [{}, {}]
        self._widths = [1, 1]

    def add(self, record: dict[str, Any]) -> None:
        """Take the next record of `metrics.jsonl`; one without a loss is passed over."""
        if not is_measurement(record):
            return
        kind = "validation_loss" in record
        of = self._kinds[kind]
        of[record["step"] // self._widths[kind]] = record
        if len(of) > 2 * _MOST_RECORDS:
            self._widths[kind] *= 2
            self._kinds[kind] = {place // 2: r for place, r in sorted(of.items())}

    def records(self) -> list[dict[str, Any]]:
        """Those that stand, by step."""
        found = (r for steps in self._kinds for r in steps.values())
        return sorted(found, key=lambda r: (r["step"], "validation_loss" in r))


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as e:
        e.filename = None  # `path` says it
        raise TrainingError(f"{path} can't be written: {disk_trouble(e) or e.strerror or e}") from e


def _sync(path: Path) -> None:
    with _writing(path), path.open("rb") as f:
        os.fsync(f.fileno())
        sync_folder(path.parent)


def is_measurement(record: dict[str, Any]) -> bool:
    """Whether a record of `metrics.jsonl` has a loss; others tell of a step that was left out."""
    return "loss" in record or "validation_loss" in record


def _parsed(line: bytes) -> dict[str, Any] | None:
    """None of a line cut short by a kill, or the empty one that ended it: its step was not finished either."""
    try:
        return orjson.loads(line)
    except ValueError:
        with suppress(ValueError, RecursionError):
            return json.loads(line)  # knows NaN
    return None


def _size(path: Path) -> int:
    try:
        with path.open("rb") as f:  # opened, as NFS may know of an older size until then
            return f.seek(0, os.SEEK_END)
    except FileNotFoundError:
        return 0


def _check_size(path: Path, promised: int, by: str) -> None:
    if _size(path) < promised:
        raise DataError(
            f"{path} has {_size(path)} bytes, and {by} beside it says that it had {promised}: the rest is lost. Bring "
            f"it back from a copy; to go on without, remove {by}"
        )
