"""What training would spend without use: days on a CPU, steps at a wrong rate, the same text many times over."""

from collections.abc import Iterator
from pathlib import Path

from openlm_pipeline.errors import OpenLMError
from openlm_pipeline.experiments import Experiment
from openlm_pipeline.result import Finding, refusal
from openlm_pipeline.runs.estimates import flops_per_token
from openlm_pipeline.runs.rates import rate_findings
from openlm_pipeline.shards.opening import open_dataset
from openlm_pipeline.storage.home import Home
from openlm_pipeline.units import format_tokens

CPU_FLOPS = 1e17
"""Operations of a training run that a CPU needs days for: 1e11 to 1e12 a second are usual."""
MANY_EPOCHS = 4
MAX_EPOCHS = 16
"""From here on repeated text is worth next to nothing (Muennighoff et al. 2023, https://arxiv.org/abs/2305.16264)."""
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
    weights = sum(source.weight for source in experiment.sources)
    for dataset in experiment.training_datasets():
        try:
            size = len(open_dataset(dataset, home)) * experiment.seq_len
        except OpenLMError:  # whoever needs it says what is wrong with it
            continue
        epochs = until * dataset.source.weight / weights / size
        if epochs > MAX_EPOCHS:
            yield refusal(
                "repeat_data",
                f"{experiment.name} would see each text of {dataset.name} {epochs:,.0f} times: {format_tokens(until)} "
                f"tokens, of which {format_tokens(size, 3)} are there",
                "Add raw text, or lower the milestones",
            )
        elif epochs > MANY_EPOCHS:
            yield Finding("warning", f"{experiment.name} sees each text of {dataset.name} {epochs:.1f} times")
