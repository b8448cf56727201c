"""What the time of a run went into: a pure function of `ledger.jsonl` and `metrics.jsonl` in its folder.

The trainer adds an event to the ledger as it starts, once it has its weights (`resume`), after each checkpoint
(`saved`) and as it ends; its steps stand in the metrics. A killed process wrote no end: its last sign of life stands
for that. Of what an earlier release trained without a ledger, the steps alone are known.
"""

import copy
import heapq
import re
from bisect import bisect_left
from dataclasses import dataclass, field, replace
from itertools import takewhile
from typing import Any, Literal, get_args

from openlm_pipeline.runs.folder import Losses, RunFolder
from openlm_pipeline.units import format_seconds

Kind = Literal["productive", "lost", "start", "save", "other", "idle"]
"""Steps that stand; steps left out, or trained again later; from the process's start to its first step; waiting for a
checkpoint; validation and the rest of a session; between sessions."""
_MOST_SPELLS = 10_000
"""From twice as many on, those of neighbouring steps become one."""


@dataclass(frozen=True)
class Spell:
    """Some time of a run."""

    kind: Kind
    seconds: float
    devices: int
    first: int
    """The step after which it began."""
    last: int
    """The last step that it was for."""
    recorded: bool


@dataclass
class Account:
    """All of a run's time, in the order of its records."""

    step: int = 0
    """Where the run stands."""
    spells: list[Spell] = field(default_factory=list)
    sessions: list[dict[str, Any]] = field(default_factory=list)
    """The `start` of each process, with its `end` (an event, or None where it was killed or still trains)."""
    interruptions: list[dict[str, Any]] = field(default_factory=list)
    """What kept steps from standing: when, after which step, how, and the seconds `lost`, `idle` and `start` by it."""
    stragglers: list[dict[str, Any]] = field(default_factory=list)
    """Ranks that the others waited for (`train.hooks.stragglers`)."""
    _clock: float | None = None
    """Up to when time is accounted for."""
    _devices: int = 1
    _recorded: bool = False
    _stall: float = 0.0
    _idle: float = 0.0
    _stride: int = 1
    _step_seconds: float = 0.0
    _alive: tuple[float, int] = (0.0, 0)
    """When the process last gave a sign of life, and a step that it certainly had reached."""
    _saved: list[int] = field(default_factory=list)
    """Steps of checkpoints, ascending."""
    _width: int = 1
    _most: int = field(default_factory=lambda: 2 * _MOST_SPELLS)

    def _add(self, kind: Kind, seconds: float, first: int, last: int) -> None:
        if seconds > 0:
            self.spells.append(Spell(kind, seconds, self._devices, first, last, self._recorded))
            if len(self.spells) > self._most:
                self._join()

    def _join(self) -> None:
        """Make spells of a kind that ended within a few steps one, but none across a checkpoint, which a milestone may
        end at, or a resumed run begin at."""
        self._width *= 4
        joined: dict[tuple[Any, ...], list[Any]] = {}
        for s in self.spells:
            key = (s.kind, s.devices, s.recorded, s.last // self._width, bisect_left(self._saved, s.last))
            if same := joined.get(key):
                same[:] = same[0] + s.seconds, min(same[1], s.first), max(same[2], s.last)
            else:
                joined[key] = [s.seconds, s.first, s.last]
        self.spells = [Spell(k[0], seconds, k[1], *steps, k[2]) for k, (seconds, *steps) in joined.items()]
        self._most = max(2 * _MOST_SPELLS, 2 * len(self.spells))

    def _advance(self, time: float, step: int, left_out: int = 0, rest: Kind = "other") -> None:
        """Account for the time up to `time`, in which `step` was reached; what no step took is `rest`."""
        first, step = self.step, max(self.step, step)
        took = (step - first) * self._step_seconds
        spent = max(0.0, time - self._clock) if self._recorded else took
        took = min(took, spent)
        lost = took * min(1.0, left_out / max(1, step - first))
        self._add("productive", took - lost, first, step)
        self._add("lost", lost, first, step)
        saving = min(self._stall, spent - took)
        ahead = rest == "start"  # it is for the step that comes next
        self._add("save", saving, step, step)
        self._add(rest, spent - took - saving, step, step + ahead)
        self.step, self._stall = step, self._stall - saving
        self._clock = max(time, self._clock or 0.0)

    def _go_back(self, step: int) -> float:
        """Training resumes after `step`: what was trained after that is trained again; how many seconds were."""
        lost = 0.0
        for i, spell in enumerate(self.spells):
            if spell.kind == "productive" and spell.last > step:
                share = min(1.0, (spell.last - step) / (spell.last - spell.first))
                self.spells[i] = replace(spell, seconds=spell.seconds * (1 - share), last=max(step, spell.first))
                self.spells.append(replace(spell, kind="lost", seconds=spell.seconds * share))
                lost += spell.seconds * share
        self.step = step
        return lost

    def _interrupted(self, how: str, time: float, step: int, **seconds: float) -> None:
        where = {"how": how, "time": time, "step": step, "devices": self._devices}
        self.interruptions.append({**where, **{f"{kind}_seconds": round(s, 3) for kind, s in seconds.items()}})

    def _end_of_session(self) -> None:
        """A process is there no more; one that wrote no end was last alive as it wrote anything."""
        if self._recorded and self.sessions[-1]["end"] is None:
            self._advance(*self._alive)

    def add_event(self, event: dict[str, Any]) -> None:
        """Of `ledger.jsonl`."""
        time, step = event["time"], event.get("step", self.step)
        if event["event"] == "start":
            self._end_of_session()
            self._idle += max(0.0, event["began"] - self._clock) if self._recorded else 0.0
            self._clock, self._devices, self._recorded, self._stall = event["began"], event["world_size"], True, 0.0
            self.sessions.append({**event, "end": None})
        elif event["event"] == "resume" and "first_step" not in self.sessions[-1]:
            self.sessions[-1]["first_step"] = step
            reached, began = self.step, self.sessions[-1]["began"]
            lost = self._go_back(step)
            self._add("idle", self._idle, step, step + 1)
            before = [(s["end"] or {"status": "killed"})["status"] for s in self.sessions[-2:-1]]
            for how in set(before) - {"completed"}:
                self._interrupted(how, began - self._idle, reached, lost=lost, idle=self._idle, start=time - began)
            self._idle = 0.0
            self._advance(time, step, rest="start")
        elif event["event"] == "resume":
            self._advance(time, step)
            reached = self.step
            if lost := self._go_back(step):
                self._interrupted("went back", time, reached, lost=lost)
        elif event["event"] == "straggler":
            self.stragglers.append(event)
        elif event["event"] == "saved":
            self._stall += event["stall_seconds"]
            if "step" in event and (not self._saved or step > self._saved[-1]):
                self._saved.append(step)
        elif event["event"] == "end":
            self._advance(time, step)
            self.sessions[-1]["end"] = event
        self._alive = time, step

    def add_record(self, record: dict[str, Any]) -> None:
        """Of `metrics.jsonl`."""
        time, step = record["time"], record["step"]
        if "loss" in record:
            if not self._recorded:
                self._devices = round(record["tokens_per_second"] / record["tokens_per_second_per_gpu"])
                if step <= self.step:
                    self._go_back(max(0, step - self._stride))
            self._step_seconds, self._stride = record["step_seconds"], max(1, step - self.step)
            self._advance(time, step, record.get("skipped_steps", 0))
        self._alive = time, self.step

    def facts(self, after: int = -1, up_to: int | None = None) -> dict[str, Any]:
        """The time of the steps after one and up to another: seconds of each kind, GPU-hours (hours of processes where
        there is no GPU) and goodput, the share of the sessions that went into steps which stand."""
        spells = [s for s in self.spells if s.last > after and (up_to is None or s.last <= up_to)]
        if not spells:
            return {}
        kinds = get_args(Kind)
        seconds = {kind: round(sum(s.seconds for s in spells if s.kind == kind), 3) for kind in kinds}
        wall = sum(seconds.values())
        session = wall - seconds["idle"]
        found = {"gpu_hours": round(sum(s.seconds * s.devices for s in spells if s.kind != "idle") / 3600, 6)}
        if not all(s.recorded for s in spells):
            found |= {f"{kind}_seconds": seconds[kind] for kind in ("productive", "lost")}
            return found | {"not_recorded": "some was trained without a ledger: of it only steps count"}
        found |= {"goodput": round(seconds["productive"] / session, 4) if session else 0.0, "wall_seconds": wall}
        return found | {f"{kind}_seconds": seconds[kind] for kind in kinds}


class History:
    """The time and the losses of a run, from one reading of its records; `update` reads what was written since.

    Memory is bounded, whatever the length of the run, but for the checkpoints in its ledger.
    """

    def __init__(self, run: RunFolder) -> None:
        self.run, self.losses = run, Losses()
        self._account, self._place, self._events = Account(_start_step(run)), 0, 0
        self.update()

    def update(self) -> None:
        """
        Raises:
            DataError: the ledger or the metrics are damaged.
        """
        whole, size = self.run.metrics_bytes()  # what the ledger gets from now on comes after these
        new = takewhile(lambda event: event["metrics_bytes"] <= size, self.run.read_ledger()[self._events :])
        events = [(event["metrics_bytes"], 0, event) for event in new]
        lines = takewhile(lambda placed: placed[0] < whole, self.run.records(self._place))
        records = ((place, 1, record) for place, record in lines)
        for _, is_record, what in heapq.merge(events, records, key=lambda placed: placed[:2]):
            if is_record:
                self._account.add_record(what)
                self.losses.add(what)
            else:
                self._account.add_event(what)
        self._place, self._events = whole, self._events + len(events)

    def account(self) -> Account:
        """The time up to the last sign of life in the folder."""
        made = copy.copy(self._account)
        made.spells = list(made.spells)
        made._end_of_session()
        return made

    def facts(self, milestone: str | None = None) -> dict[str, Any]:
        """The time of a run, or of what came between a milestone and the one before; empty where nothing is known."""
        return self.account().facts() if milestone is None else self.of_milestones(milestone).get(milestone, {})

    def of_milestones(self, *only: str) -> dict[str, dict[str, Any]]:
        """The time of each milestone, or of some, by label."""
        made, before, found = self.account(), _start_step(self.run), {}
        for checkpoint in self.run.saved():
            if checkpoint.milestone and (not only or checkpoint.milestone in only):
                found[checkpoint.milestone] = made.facts(before, checkpoint.step)
            before = checkpoint.step if checkpoint.milestone else before
        return found


def facts(run: RunFolder, milestone: str | None = None) -> dict[str, Any]:
    """As `History.facts`."""
    return History(run).facts(milestone)


def machine(session: dict[str, Any]) -> str:
    """What the `start` of a process says of devices, hosts and software."""
    devices = ", ".join(f"{count} x {name}" for name, count in session["devices"].items())
    return f"{devices} on {', '.join(session['hosts'])}, {session['software']}"


def trained_on(run: RunFolder, milestone: str) -> dict[str, str]:
    """Machine and commit of the process that trained the last step of a milestone, where they are recorded."""
    step = next((c.step for c in run.saved() if c.milestone == milestone), 0)
    began: dict[str, Any] = {}
    last = began
    for event in run.read_ledger():
        if event["event"] == "start":
            began = event
        elif event["event"] == "resume" and event["step"] < step:
            last = began
    commit = re.search(r"\((.+)\)", last.get("code", ""))
    return ({"machine": machine(last)} if last else {}) | ({"commit": commit[1]} if commit else {})


def sentence(of: dict[str, Any]) -> str:
    """Facts in one line, for people."""
    if not of:
        return "not recorded"
    names = {
        "lost": "steps lost",
        "start": "starts",
        "save": "saves",
        "other": "validation and the rest",
        "idle": "idle",
    }
    parts = [f"{of['gpu_hours']:,.3g} GPU-hours"]
    parts += [] if "goodput" not in of else [f"goodput {of['goodput']:.1%}"]
    parts += [f"steps {format_seconds(of['productive_seconds'])}"]
    parts += [f"{name} {format_seconds(of[key])}" for kind, name in names.items() if of.get(key := f"{kind}_seconds")]
    return ", ".join([*parts, *([of["not_recorded"]] if "not_recorded" in of else [])])


def _start_step(run: RunFolder) -> int:
    """The step that a fork began after, of its parent's; else 0."""
    begun = run.identity.get("parent", {}).get("tokens", 0)
    return begun // run.identity["training"]["global_batch"]
