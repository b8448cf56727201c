"""One process of a run, from the lock on its folder to `outcome.json`."""

from collections.abc import Collection, Mapping
from pathlib import Path

from openlm_pipeline.experiments import Experiment
from openlm_pipeline.fingerprint import short
from openlm_pipeline.result import refuse
from openlm_pipeline.runs.folder import RunFolder
from openlm_pipeline.runs.identity import run_identity
from openlm_pipeline.runs.machine import without_gpu
from openlm_pipeline.runs.parent import parent_identity, weights_identity
from openlm_pipeline.runs.rates import rate_findings
from openlm_pipeline.runs.repeats import content_of, overlaps, repeated
from openlm_pipeline.shards.opening import open_dataset
from openlm_pipeline.storage.home import Home
from train.distributed import World, raise_file_limit, start
from train.hooks.watchdog import record_collectives
from train.loop import Outcome, Trainer


def run_training(
    experiment: Experiment,
    home: Home,
    until: int,
    *,
    allow: Collection[str] = (),
    run_path: Path | None = None,
    initial_weights: Mapping[Path, float] | None = None,
) -> Outcome:
    """Train to `until` tokens in the process group of this process, and leave `outcome.json` behind.

    Args:
        allow: consents; `supersede` sets another run in the same folder aside, `remake` a damaged milestone, `cpu`
            trains for days where there is no GPU.
        run_path: the run's folder; by default the one in `home` that the experiment's name and version say.
        initial_weights: checkpoints that a new run begins with the sum of, each times its coefficient.

    Raises:
        OpenLMError: what is wrong with the recipe, the data, the folder or the run.
    """
    record_collectives()
    raise_file_limit()
    world = start()
    if world.device.type == "cpu":
        refuse(without_gpu(experiment, until), allow)
    refuse(world.from_rank0(lambda: list(rate_findings(experiment, home, until))), allow)
    run = RunFolder(run_path or home.run(experiment.name, experiment.version))
    datasets = [open_dataset(d, home) for d in experiment.training_datasets()]
    versions = {d.name: opened.version for d, opened in zip(experiment.training_datasets(), datasets)}
    began = world.from_rank0(lambda: parent_identity(experiment, home))
    identity = run_identity(experiment, versions, began)
    if initial_weights:
        identity["initial_weights"] = world.from_rank0(lambda: weights_identity(initial_weights))

    def held() -> Outcome:
        world.from_rank0(lambda: run.claim(experiment, identity, allow))
        world.from_rank0(run.clear_outcome)  # of an earlier process: until this one ends there is none
        trainer = None
        try:
            trainer = Trainer(
                experiment,
                home,
                world,
                datasets,
                run=run,
                initial_weights=initial_weights,
                start_tokens=began["tokens"] if experiment.parent else 0,
                allow=allow,
            )
            trainer.console.print(f"run {run.path} ({short(run.fingerprint)})")
            for what in world.from_rank0(lambda: _read_again(experiment, home, until)):
                trainer.warn(what)
            outcome = trainer.train(until)
        except BaseException as e:
            if run.read_outcome() is None:  # another rank may have failed first, and this one for the lack of it
                step, tokens = (trainer.step, trainer.tokens) if trainer else (0, 0)
                run.write_outcome("failed", step, tokens, reason=str(e) or type(e).__name__)
            raise
        else:
            if world.rank == 0:
                run.write_outcome(outcome.status, outcome.step, outcome.tokens)
            for hook in trainer.hooks:
                hook.at_outcome()
        finally:
            if trainer:
                trainer.close()
        return outcome

    if world.rank != 0:
        world.from_rank0(None)
        return held()
    return _hold_lock(run, world, held)


def _read_again(experiment: Experiment, home: Home, until: int) -> list[str]:
    """What of the data is read more than once, as far as the shards tell."""
    contents = {d.name: content_of(d, home, []) for d in experiment.datasets()}
    return [found.what for found in (*repeated(experiment, home, until), *overlaps(experiment, contents))]


def _hold_lock(run: RunFolder, world: World, held) -> Outcome:
    """Rank 0 holds the run's lock for its lifetime; if it cannot, every rank hears of it."""
    lock = run.lock()
    world.from_rank0(lock.__enter__)
    try:
        return held()
    finally:
        lock.__exit__(None, None, None)
