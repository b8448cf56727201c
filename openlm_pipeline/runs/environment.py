"""The software and the machine that a command runs on: what a bug report needs. Nothing that is told is imported."""

import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, distributions, requires, version
from pathlib import Path
from typing import Any

import psutil

from openlm_pipeline import __version__, registry
from openlm_pipeline.errors import public
from openlm_pipeline.runs.programs import programs_folder
from openlm_pipeline.storage.home import Home
from openlm_pipeline.strict import SECRET_NAME
from openlm_pipeline.units import format_bytes

_MOST_DIFF = 1 << 20
"""Characters of what differs from a commit; of more only the hash is kept."""


def code_version() -> str:
    """The version, in a checkout with its commit: `0.1.0 (df959f5a1b2c)`, with `-dirty` where files differ from it."""
    if not (programs_folder() / ".git").exists():
        return __version__
    place = ("git", "-C", str(programs_folder()))
    commit = _output(*place, "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*")
    return f"{__version__} ({commit})" if commit else __version__


def software() -> dict[str, Any]:
    """What a process runs on: Python, platform, packages and, in a checkout, the commit and what differs from it."""
    commit, changed = "", ""
    if (programs_folder() / ".git").exists():
        place = ("git", "-C", str(programs_folder()))
        commit, changed = _output(*place, "rev-parse", "HEAD"), _output(*place, "diff", "HEAD")
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": dict(sorted((d.name, d.version) for d in distributions() if d.name)),
        "code": code_version(),
        "commit": commit or None,
        "diff_sha256": hashlib.sha256(changed.encode()).hexdigest() if changed else None,
        "diff": changed if 0 < len(changed) <= _MOST_DIFF else None,
    }


def _output(*command: str) -> str:
    """What a program says; nothing where it is not installed or fails."""
    if not shutil.which(command[0]):
        return ""
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def environment() -> dict[str, Any]:
    """Names and values. Secrets are only said to be set, and passwords and queries are taken out of URLs."""
    home, memory = Home.from_env(), psutil.virtual_memory()
    place = next(p for p in (home.root, *home.root.parents) if p.exists())
    disk = shutil.disk_usage(place)
    gpus = _output("nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader").splitlines()
    return {
        "openlm_pipeline": code_version(),
        "installed at": str(Path(__file__).parents[1]),
        "python": f"{platform.python_version()} ({sys.executable})",
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "memory": f"{format_bytes(memory.available)} free of {format_bytes(memory.total)}",
        "gpus": gpus or "none that nvidia-smi knows",
        "home": str(home.root) if home.root.exists() else f"{home.root}, not there yet",
        "dagster home": os.environ.get("DAGSTER_HOME") or "not set",
        "disk": f"{format_bytes(disk.free)} free of {format_bytes(disk.total)} at {place}",
        "packages": _packages(),
        "variables": {
            name: _shown(name, value)
            for name, value in sorted(os.environ.items())
            if name.startswith("OPENLM_") or name in ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS")
        },
        "choices": {r.kind: ", ".join(r.names) for r in vars(registry).values() if isinstance(r, registry.Registry)},
    }


def _packages() -> dict[str, str]:
    """Versions of what this one needs or could use, where it is installed itself."""
    found = {}
    with suppress(PackageNotFoundError):
        for requirement in requires("openlm-pipeline") or []:
            name = re.split(r"[^\w.-]", requirement)[0]
            with suppress(PackageNotFoundError):
                found[name] = version(name)
    return found


def _shown(name: str, value: str) -> str:
    return "set" if SECRET_NAME.fullmatch(name) else public(value) if "://" in value else value
