"""The machine at hand, as training needs it: its GPUs, memory and disk, told without torch."""

import importlib.util
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from openlm_pipeline.experiments import Experiment
from openlm_pipeline.result import Finding, refusal
from openlm_pipeline.runs.estimates import flops_per_token
from openlm_pipeline.units import format_tokens

CPU_FLOPS = 1e17
"""Operations of a training run that a CPU needs days for: 1e11 to 1e12 a second are usual."""
_GPU_DEVICES = ("/dev/nvidia0", "/dev/nvidiactl", "/dev/kfd", "/dev/dxg")
_CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
_QUERY_SECONDS = 10


@dataclass(frozen=True)
class Gpu:
    """A GPU of this machine."""

    name: str
    memory_bytes: int


def has_gpu() -> bool:
    """Whether this machine has a GPU that the trainer can use, as far as can be told without torch."""
    return any(Path(device).exists() for device in _GPU_DEVICES)


def gpus() -> list[Gpu]:
    """The NVIDIA GPUs of this machine, as its driver lists them; none where there is no `nvidia-smi` that answers."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    command = [program, "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=_QUERY_SECONDS, check=True).stdout
    except (subprocess.SubprocessError, OSError):  # a driver that does not answer: nothing is known of its GPUs
        return []
    rows = [line.rpartition(",") for line in said.splitlines() if line.strip()]
    return [Gpu(name.strip(), int(mib) << 20) for name, _, mib in rows if mib.strip().isdigit()]


def memory_bytes() -> int:
    """What this machine, or the container that this is in, has."""
    limits = [psutil.virtual_memory().total]
    for path in map(Path, _CGROUP_LIMITS):
        if path.is_file() and (text := path.read_text().strip()).isdigit():
            limits.append(int(text))
    return min(limits)


def free_disk(folder: Path) -> int:
    """Bytes that may still be written below a folder, which need not be there yet."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def without_gpu(experiment: Experiment, until: int) -> Iterator[Finding]:
    """What training up to `until` tokens needs a consent for where there is no GPU: what takes a CPU days."""
    tokens = until - experiment.start_tokens()
    operations = flops_per_token(experiment.model_config_resolved(), experiment.seq_len) * tokens
    if operations > CPU_FLOPS:
        yield refusal(
            "cpu",
            f"{experiment.name} takes {operations:.1e} operations for {format_tokens(tokens)} tokens, and this machine "
            "has no GPU: a CPU needs days or years",
            "Train it where there is one (launcher.kind, or another machine)",
        )


def missing_for_reports(experiment: Experiment) -> Iterator[str]:
    """What `execution.report_to` asks for and this machine has not: a package, or the key of the service, by name."""
    for name in experiment.execution.report_to:
        if importlib.util.find_spec(name) is None:
            yield f"execution.report_to has {name}, which is not installed: pip install 'openlm-pipeline[{name}]'"
    online = os.environ.get("WANDB_MODE", "online") in ("online", "shared")
    if "wandb" in experiment.execution.report_to and online and not os.environ.get("WANDB_API_KEY"):
        yield (
            "execution.report_to has wandb, but WANDB_API_KEY is not set. Set it (https://wandb.ai/authorize), or "
            "WANDB_MODE=offline, whose files `wandb sync` sends later"
        )
