"""What training would spend without use: days on a CPU, steps at a wrong rate, the same text many times over."""

from collections.abc import Iterator
from pathlib import Path

from openlm_pipeline.experiments import Experiment
from openlm_pipeline.result import Finding, refusal
from openlm_pipeline.runs.estimates import flops_per_token
from openlm_pipeline.runs.rates import rate_findings
from openlm_pipeline.runs.repeats import repeated
from openlm_pipeline.storage.home import Home
from openlm_pipeline.units import format_tokens

CPU_FLOPS = 1e17
"""Operations of a training run that a CPU needs days for: 1e11 to 1e12 a second are usual."""
_GPU_DEVICES = ("/dev/nvidia0", "/dev/nvidiactl", "/dev/kfd", "/dev/dxg")


def has_gpu() -> bool:
    """Whether this machine has a GPU that the trainer can use, as far as can be told without torch."""
    return any(Path(device).exists() for device in _GPU_DEVICES)


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


def spending(experiment: Experiment, home: Home, until: int) -> Iterator[Finding]:
    """What training up to `until` tokens needs a consent for; datasets that are not made yet say nothing."""
    if experiment.launcher.kind == "local" and not has_gpu():
        yield from without_gpu(experiment, until)
    yield from rate_findings(experiment, home, until)
    yield from repeated(experiment, home, until)
