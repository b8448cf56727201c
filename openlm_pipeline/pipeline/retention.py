"""What may be removed from a home, why, and what can no longer be done afterwards; planned first, then done.

`plan_gc` only reads. `apply` looks again under the locks of the folders, renames what is still due to `.trash-*` beside
it and deletes that, so that a kill leaves nothing half; the next plan lists what is left of the trash.

Milestones, raw files, the shards a run was trained on, and whatever a live process has locked are never in a plan.
Nothing outside the home is touched, and symbolic links are not followed. The optimizer's part of a milestone is not
removed on its own: a checkpoint's files hold model and optimizer together.
"""

import contextlib
import os
import secrets
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from openlm_pipeline.errors import BusyError
from openlm_pipeline.pipeline.retention_rules import TRASH, GcEntry, Kept, Retention, Scan
from openlm_pipeline.result import Say
from openlm_pipeline.storage.files import folder_lock, is_held
from openlm_pipeline.storage.home import Home

__all__ = ["GcEntry", "Removals", "Kept", "Retention", "apply", "plan_gc"]


@dataclass(frozen=True)
class Removals:
    """What would go; nothing has been touched."""

    home: Home
    retention: Retention
    entries: tuple[GcEntry, ...]
    kept: tuple[Kept, ...]

    @property
    def bytes(self) -> int:
        return sum(e.bytes for e in self.entries)


def plan_gc(home: Home, retention: Retention | None = None, *, now: float | None = None) -> Removals:
    """Look through a home.

    Args:
        now: seconds since the epoch, for ages; by default the clock's.
    """
    retention = retention or Retention()
    scan = Scan(home.root.resolve(), retention, time.time() if now is None else now).everything()
    entries, kept = [], scan.kept
    for entry in scan.entries:
        if _is_busy(entry):
            kept.append(Kept(entry.path, entry.bytes, "a live process works there"))
        else:
            entries.append(entry)
    return Removals(home, retention, tuple(entries), tuple(kept))


def apply(plan: Removals, report: Say, *, now: float | None = None) -> int:
    """Remove what the plan names, as far as it is still due; return the bytes removed.

    Raises:
        BusyError: another process is removing things from this home.
    """
    root = plan.home.root.resolve()
    with folder_lock(root / ".gc", "removing what is no longer needed"):
        busy: set[Path] = set()
        with contextlib.ExitStack() as locks:
            for lock in sorted({e.lock for e in plan.entries if e.lock}):
                try:
                    locks.enter_context(folder_lock(lock, "removing what is no longer needed"))
                except BusyError:
                    busy.add(lock)
            scan = Scan(root, plan.retention, time.time() if now is None else now).everything()
            due = {e.path for e in scan.entries}
            trash: list[tuple[Path, GcEntry]] = []
            for entry in plan.entries:
                if entry.lock in busy or entry.path not in due or (entry.lock is None and _is_busy(entry)):
                    report(f"{entry.path.relative_to(root)} stays: it is in use now, or has changed since the plan")
                    continue
                if entry.path.name.startswith(TRASH):
                    target = entry.path
                else:
                    target = entry.path.with_name(f"{TRASH}{entry.path.name}.{secrets.token_hex(4)}")
                    entry.path.rename(target)
                trash.append((target, entry))
        for path, entry in trash:  # without the locks: the names are free, and this can take long
            shutil.rmtree(path) if path.is_dir() else path.unlink()
            report(f"removed {entry.path.relative_to(root)}")
    return sum(entry.bytes for _, entry in trash)


def _is_busy(entry: GcEntry) -> bool:
    inside = [] if entry.path.is_file() else [Path(f) for f, _, names in os.walk(entry.path) if ".lock" in names]
    return any(map(is_held, [*inside, *([entry.lock] if entry.lock else [])]))
