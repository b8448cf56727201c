"""Tasks of a stage on a pool: what they made, what of their input is damaged, and lines on how far they are."""

import time
from typing import Any

from openlm_pipeline.errors import DataError
from openlm_pipeline.pools import Call, Facts, Pool
from openlm_pipeline.result import ProgressLine, Say
from openlm_pipeline.units import format_bytes, format_seconds, format_tokens

_REPORT_SECONDS = 5.0


class Meter:
    """Progress of a stage in bytes of its input, as lines for people."""

    def __init__(self, what: str, total_bytes: int, report: Say) -> None:
        self._what, self._total, self._report = what, max(1, total_bytes), report
        self._facts: dict[str, Facts] = {}
        self._started = self._reported = time.monotonic()

    def update(self, name: str, facts: Facts) -> None:
        self._facts[name] = facts
        if time.monotonic() - self._reported >= _REPORT_SECONDS:
            self.say()

    def say(self) -> None:
        self._reported = now = time.monotonic()
        elapsed = max(now - self._started, 1e-3)
        done = min(self._total, sum(f.get("raw_bytes", 0) for f in list(self._facts.values())))
        tokens = sum(f.get("tokens", 0) for f in list(self._facts.values()))
        line = f"{self._what}: {format_bytes(done)} of {format_bytes(self._total)} ({done / self._total:.0%})"
        if tokens:
            line += (
                f", {format_tokens(tokens, digits=3)} tokens at {format_tokens(round(tokens / elapsed), digits=3)}/s"
            )
        line += f", {format_seconds(elapsed)}"
        facts = {
            "bytes_done": done,
            "bytes_total": self._total,
            "tokens": tokens,
            "tokens_per_second": tokens / elapsed,
        }
        if done and done < self._total:
            facts["seconds_left"] = elapsed / done * (self._total - done)
            line += f", about {format_seconds(facts['seconds_left'])} left"
        self._report(ProgressLine(line, facts))


def run_all(
    pool: Pool, meter: Meter, sizes: dict[str, int], calls: dict[str, Call]
) -> tuple[dict[str, Any], dict[str, DataError]]:
    """Run the calls on the pool; results by name, and what is damaged by name.

    Args:
        sizes: bytes of input of each call, which count as read when it ends.
    """
    results: dict[str, Any] = {}
    damaged: dict[str, DataError] = {}
    tokens: dict[str, int] = {}

    def on_progress(name: str, facts: Facts) -> None:
        if name not in results:
            tokens[name] = facts.get("tokens", 0)
            meter.update(name, facts)

    for name, result in pool.run(calls, on_progress):
        if isinstance(result, DataError):
            damaged[name] = result
            continue
        results[name] = result
        made = getattr(result, "tokens", tokens.get(name, 0))
        meter.update(name, {"raw_bytes": sizes[name], "tokens": made})
    return results, damaged


def raise_all(damaged: dict[str, DataError]) -> None:
    """
    Raises:
        DataError: there is one in `damaged`; all are named.
    """
    if len(damaged) == 1:
        raise next(iter(damaged.values()))
    if damaged:
        lines = "\n  ".join(str(damaged[name]) for name in sorted(damaged))
        raise DataError(
            f"{len(damaged)} files can't be used:\n  {lines}\n"
            "To do without such raw files, set the source's on_bad_file: skip, or --on-bad-file skip"
        )
