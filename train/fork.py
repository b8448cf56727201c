"""The beginning of a fork: the state of its parent at a milestone."""

from openlm_pipeline.errors import ConfigError
from openlm_pipeline.experiments import Experiment
from openlm_pipeline.files import read_json
from openlm_pipeline.lineage.fingerprint import differences
from openlm_pipeline.models.transformer import Transformer
from openlm_pipeline.runs.checkpoints import MODEL_CONFIG, Checkpoint, verify
from openlm_pipeline.runs.folder import RunFolder
from openlm_pipeline.runs.weights import SafeReader
from train import checkpoint as checkpoints
from train.averages import Averages
from train.distributed import World
from train.optimizers import Optimizers

_OF_THE_STATE = ("optimizer", "state_precision", "no_decay")
"""Settings of `training` on which the form of the optimizer's state depends."""


def begin_from(
    checkpoint: Checkpoint,
    experiment: Experiment,
    world: World,
    model: Transformer,
    optimizer: Optimizers,
    extra: checkpoints.Extra,
) -> Averages:
    """Load a parent's checkpoint: the model, the optimizer unless it is to begin anew, and what of `extra` it has.

    Returns:
        The averages of the fork: those that the parent has go on, others begin at its weights.

    Raises:
        DataError: a file of the parent is damaged.
        ConfigError: the fork has another model, or an optimizer that can't go on from the parent's.
    """
    world.from_rank0(lambda: _check(checkpoint, experiment, model))
    if experiment.parent.optimizer == "reset":
        checkpoints.load_weights(checkpoint, model)
        return Averages(experiment.training.averages, model)
    saved = SafeReader(checkpoint.path).read_metadata().state_dict_metadata
    there = {name: state for name, state in extra.items() if any(key.startswith(f"{name}.") for key in saved)}
    checkpoints.load(checkpoint, model, optimizer, there)
    averages = Averages(experiment.training.averages, model)
    averages.state |= {name: state for name, state in there.items() if name in averages.state}
    return averages


def _check(checkpoint: Checkpoint, experiment: Experiment, model: Transformer) -> None:
    verify(checkpoint)
    theirs, ours = read_json(checkpoint.path / MODEL_CONFIG), model.config.model_dump()
    if changed := differences({**theirs, "seq_len": 0}, {**ours, "seq_len": 0}):
        raise ConfigError(f"a fork has its parent's model; here differ: {'; '.join(changed)}")
    before = RunFolder(checkpoint.path.parents[1]).identity["training"]
    now = experiment.training.model_dump(mode="json")
    parts = [{name: training[name] for name in _OF_THE_STATE} for training in (before, now)]
    if experiment.parent.optimizer == "keep" and (changed := differences(*parts)):
        raise ConfigError(
            f"the optimizer's state of the parent does not fit: {'; '.join(changed)}; parent.optimizer=reset begins "
            "with a new one"
        )
