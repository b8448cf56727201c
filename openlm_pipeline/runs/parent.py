"""The milestone that a fork continues from."""

from openlm_pipeline.checkpoints.folders import Checkpoint, list_checkpoints
from openlm_pipeline.errors import ConfigError, MissingInputError
from openlm_pipeline.experiments import Experiment
from openlm_pipeline.fingerprint import Tree, settings_tree
from openlm_pipeline.runs.folder import RunFolder
from openlm_pipeline.storage.home import Home
from openlm_pipeline.units import format_tokens, milestone_label


def parent_folder(experiment: Experiment, home: Home) -> RunFolder:
    """The run folder of a fork's parent."""
    return RunFolder(home.run(experiment.parent.run, experiment.parent.version))


def parent_checkpoint(experiment: Experiment, home: Home) -> Checkpoint:
    """The checkpoint that a fork continues from, its files not yet verified.

    Raises:
        MissingInputError: it is not there.
    """
    parent, folder = experiment.parent, parent_folder(experiment, home)
    if (folder.path / "run.json").exists():
        label = milestone_label(parent.milestone)
        for checkpoint in list_checkpoints(folder.checkpoints, folder.fingerprint, warn=lambda _: None):
            if checkpoint.milestone == label:
                return checkpoint
    tokens = format_tokens(parent.milestone)
    raise MissingInputError(
        f"{experiment.name} continues from {parent.run} at {tokens} tokens, a milestone that is not in "
        f"{folder.checkpoints}; `openlm train {parent.run} --until {tokens}` makes it"
    )


def parent_identity(experiment: Experiment, home: Home) -> Tree | None:
    """What a fork's identity holds of its parent: `checkpoint`, a digest, and `tokens`; None where there is no parent.

    For a parent that is gone it is what the fork recorded when it began.

    Raises:
        MissingInputError: the parent is not there, and the fork never began.
        ConfigError: the parent's tokens are no whole number of the fork's steps.
    """
    if experiment.parent is None:
        return None
    try:
        checkpoint = parent_checkpoint(experiment, home)
    except MissingInputError:
        own = RunFolder(home.run(experiment.name, experiment.version))
        recorded = own.identity.get("parent") if (own.path / "run.json").exists() else None
        settings = settings_tree(experiment.parent)
        if recorded is None or any(recorded.get(name) != settings[name] for name in settings):
            raise
        return {"checkpoint": recorded["checkpoint"], "tokens": recorded["tokens"]}
    batch = experiment.training.global_batch
    if checkpoint.tokens % batch:
        raise ConfigError(
            f"{experiment.name} begins after {checkpoint.tokens:,} tokens of {experiment.parent.run}, which is no "
            f"whole number of its steps of {batch:,} tokens; choose another training.global_batch"
        )
    return {"checkpoint": checkpoint.digest, "tokens": checkpoint.tokens}
