"""The trainer itself, ready for its first step, for the benchmarks that measure training."""

import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from openlm_pipeline.experiments import load_experiment
from openlm_pipeline.models.init import init_std, parameter_name
from openlm_pipeline.runs.folder import RunFolder
from openlm_pipeline.runs.identity import run_identity
from openlm_pipeline.shards.opening import open_dataset
from openlm_pipeline.storage.home import Home
from train.distributed import World
from train.loop import Trainer
from train.signals import STOP_SIGNALS


@contextmanager
def ready_trainer(recipe: str, overrides: Sequence[str], home: Home, world: World) -> Iterator[Trainer]:
    """The trainer of a recipe before its first step; it is closed at the end of the `with` block.

    Its weights have the standard deviations of a run's, and are drawn on the device: on one CPU thread those of
    `open_lm_7b` take minutes. Signals interrupt the block, instead of asking for a checkpoint.
    """
    experiment = load_experiment(recipe, overrides)
    sources = experiment.training_datasets()
    datasets = [open_dataset(d, home) for d in sources]
    identity = run_identity(experiment, {d.name: opened.version for d, opened in zip(sources, datasets)})
    run_folder = RunFolder(home.run(experiment.name, experiment.version))
    world.from_rank0(lambda: run_folder.claim(experiment, identity, ["supersede"]))
    trainer = Trainer(experiment, home, world, datasets, run=run_folder)
    for number in STOP_SIGNALS:
        signal.signal(number, signal.default_int_handler)
    if trainer.stop.requested:
        raise KeyboardInterrupt
    try:
        with torch.no_grad():
            for name, parameter in trainer.model.named_parameters():
                local = parameter.to_local()
                if local.ndim == 1:
                    local.fill_(1)
                else:
                    local.normal_(std=init_std(parameter_name(name), trainer.model.config))
        for hook in trainer.hooks:
            hook.at_start(experiment.milestones[-1])
            hook.at_resume()
        yield trainer
    finally:
        for hook in trainer.hooks:
            hook.at_end()
        trainer.close()
