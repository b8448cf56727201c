"""Paired measurements of whole processes: CPU-seconds and peak memory, interleaved, as Markdown.

Only the standard library is imported here: a child's peak memory starts at that of the process that starts it.
"""

import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Usage:
    """What one process and the children it waited for took."""

    cpu_seconds: float
    """User and system time."""
    peak_mib: float
    """Resident memory of the largest of the processes."""
    output: str


def run(command: Sequence[str], **environment: str) -> Usage:
    """Run a command to its end.

    Raises:
        SystemExit: it failed; its output is shown.
    """
    env = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env, cwd=ROOT
    ) as process:
        output = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed with {process.returncode}:\n{output}")
    unit = 1 << 20 if sys.platform == "darwin" else 1 << 10
    return Usage(usage.ru_utime + usage.ru_stime, usage.ru_maxrss / unit, output)


def openlm_tokenize(
    raw: Path, tokenizer: Path, home: Path, *, workers: int, samples_per_shard: int = 8192
) -> list[str]:
    """Command that makes shards of a raw file in `home`/shards/raw/v1; it needs OPENLM_HOME to be `home`."""
    recipe = home / "benchmark.yaml"
    settings = {
        "name": "benchmark", "seq_len": 2048, "samples_per_shard": samples_per_shard, "milestones": ["1M"],
        "tokenizer": {"name": "benchmark", "source": str(tokenizer)},
        "sources": [{"name": "raw", "files": [str(raw)]}],
        "model": {"name": "open_lm_11m"}, "training": {"global_batch": 2048, "lr": 1e-3},
    }  # fmt: skip
    recipe.write_text(json.dumps(settings))
    return [sys.executable, "-m", "openlm_pipeline", "tokenize", str(recipe), "--workers", str(workers)]


def make_shards(home: Path, seq_len: int, files: str = "*") -> Path:
    """Shards of the embedded corpus, or of some of its files."""
    recipe = home / "embedded.yaml"
    settings = {
        "name": "embedded", "seq_len": seq_len, "milestones": ["1M"],
        "tokenizer": {"name": "embedded", "train": {"vocab_size": 8192}},
        "sources": [{"name": "embedded", "files": [f"raw/embedded/train/{files}.jsonl.zst"], "origin": "embedded"}],
        "model": {"name": "open_lm_11m"}, "training": {"global_batch": seq_len, "lr": 1e-3},
    }  # fmt: skip
    recipe.write_text(json.dumps(settings))
    run([sys.executable, "-m", "openlm_pipeline", "tokenize", str(recipe), "--workers", "1"], OPENLM_HOME=str(home))
    return home / "shards" / "embedded" / "v1"


def installed(module: str, python: str = sys.executable) -> bool:
    """Whether another interpreter, or this one, can import a module."""
    return subprocess.run([python, "-c", f"import {module}"], capture_output=True, check=False).returncode == 0


def spread(values: Sequence[float], digits: int = 2) -> str:
    """`median (min-max)`."""
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f}-{max(values):.{digits}f})"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows))


def ratios(values: Mapping[str, Sequence[float]], base: str) -> dict[str, list[float]]:
    """Each run's value over the base's of the same round."""
    return {name: [v / b for v, b in zip(series, values[base])] for name, series in values.items()}


def machine(*packages: str) -> str:
    """CPU, cores, Python and the packages' versions, in one line."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        cpu = next(
            (line.split(": ", 1)[1] for line in info.read_text().splitlines() if line.startswith("model name")), cpu
        )
    found = []
    for package in packages:
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            found.append(f"{package} not installed")
    return f"{cpu}, {os.cpu_count()} cores, {platform.system()}, Python {platform.python_version()}; {', '.join(found)}"


def show(text: str, path: Path | None) -> None:
    """Print a benchmark's result, and write it to `path` if there is one."""
    print(f"\n{text}")
    if path:
        path.write_text(text + "\n")
