"""Mutated files of every kind that a stranger may send: each is read, or refused in one line; nothing else happens.

Every input comes of its kind and number, so a finding is run again by `python tests/fuzz/test_fuzz.py KIND NUMBER`. A
child process reads them, and may take 500 MiB more than it has when it begins, and 30 seconds for each.
"""

import faulthandler
import os
import random
import resource
import shutil
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

import pytest
from kinds import KINDS, Kind

from openlm_pipeline.errors import OpenLMError, printable

MOST_BYTES = 500 << 20
SECONDS = 30
"""Of a CPU; on a busy machine an input may be under way four times as long."""
FEW, MANY = 300, 10_000


def _try(kind: Kind, name: str, number: int, folder: Path) -> str:
    """`read`, `refused`, or what went wrong."""
    out = folder / "input"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    path = kind.write(random.Random(f"{name} {number}"), out)
    try:
        kind.read(path)
    except OpenLMError as e:
        said = str(e)
        return "refused" if said and printable(said) == said else f"an error that is not printable: {said!r}"
    except BaseException:  # noqa: BLE001 - whatever it is, it is what this looks for
        return traceback.format_exc(limit=-6)
    return "read"


def _limit_memory() -> None:
    status = Path("/proc/self/status").read_text()
    used = int(status.partition("VmData:")[2].split()[0]) << 10
    resource.setrlimit(resource.RLIMIT_DATA, (used + MOST_BYTES, resource.RLIM_INFINITY))


def _child(kind: Kind, name: str, numbers: range, folder: Path, log: Path) -> None:
    """Append a line for each input as it begins, and how it ended."""
    with log.open("a") as out, log.with_suffix(".err").open("a") as errors:
        os.dup2(errors.fileno(), 1)
        os.dup2(errors.fileno(), 2)
        _limit_memory()
        for number in numbers:
            out.write(f"{number}\t")
            out.flush()
            faulthandler.dump_traceback_later(4 * SECONDS, exit=True, file=errors)
            began = time.process_time()
            ended = _try(kind, name, number, folder)
            faulthandler.cancel_dump_traceback_later()
            if (took := time.process_time() - began) > SECONDS:
                ended = f"it took {took:.0f} CPU-seconds"
            out.write(ended.replace("\n", "\\n") + "\n")


def fuzz(name: str, count: int, folder: Path, first: int = 0) -> tuple[Counter[str], list[str]]:
    """How many were read and refused, and what went wrong, each with its number."""
    kind = KINDS[name](folder)
    kind.prepare()
    log, number, counts, wrong = folder / "log", first, Counter[str](), list[str]()
    while number < first + count:
        log.write_text("")
        if (pid := os.fork()) == 0:
            try:
                _child(kind, name, range(number, first + count), folder, log)
                os._exit(0)
            finally:
                os._exit(1)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        for line in log.read_text().splitlines():
            text, _, ended = line.partition("\t")
            number = int(text) + 1
            counts[ended] += ended in ("read", "refused")
            if not ended:
                ended = f"its process ended with {status}: {log.with_suffix('.err').read_text()[-1500:]}"
            if ended not in ("read", "refused"):
                wrong.append(f"{name} {text}: " + ended.replace("\\n", "\n"))
    return +counts, wrong


def _check(name: str, count: int, folder: Path) -> None:
    counts, wrong = fuzz(name, count, folder)
    assert not wrong, f"{len(wrong)} of {count}, the first: {wrong[0]}"
    assert counts["refused"] > count // 20 and counts["read"]  # the inputs are neither all broken nor all whole


@pytest.mark.parametrize("name", KINDS)
def test_mutated_files_are_read_or_refused(name: str, tmp_path: Path) -> None:
    _check(name, FEW, tmp_path)


@pytest.mark.drill
@pytest.mark.parametrize("name", KINDS)
def test_ten_thousand_of_each_kind(name: str, tmp_path: Path) -> None:
    _check(name, MANY, tmp_path)


if __name__ == "__main__":
    asked, begin, many = sys.argv[1], int(sys.argv[2]), int((*sys.argv, 1)[3])
    with tempfile.TemporaryDirectory() as scratch:
        found, findings = fuzz(asked, many, Path(scratch), begin)
    alike: dict[str, list[str]] = {}
    for finding in findings:
        place = [line for line in finding.splitlines() if line.startswith("  File")][-1:]
        alike.setdefault(f"{place} {finding.strip().splitlines()[-1][:90]}", []).append(finding)
    print(f"{asked}: {dict(found)}, {len(findings)} findings of {len(alike)} kinds")
    for some in sorted(alike.values(), key=len, reverse=True):
        print(f"---- {len(some)} times: {some[0][:2500]}")
