"""What a run begins with: the milestone that a fork continues from, or weights from elsewhere."""

from collections.abc import Mapping
from pathlib import Path

from openlm_pipeline.checkpoints.folders import INFO, Checkpoint, promote, read_checkpoint, recorded_config
from openlm_pipeline.errors import ConfigError, MissingInputError
from openlm_pipeline.experiments import Experiment
from openlm_pipeline.fingerprint import Tree, differences, fingerprint, settings_tree
from openlm_pipeline.ordering.continued import order_record
from openlm_pipeline.runs.folder import RunFolder
from openlm_pipeline.storage.file_hashes import FileHashes
from openlm_pipeline.storage.home import Home
from openlm_pipeline.units import format_tokens, milestone_label, parse_tokens

_OF_THE_STATE = ("optimizer", "optimizer_settings", "state_precision", "no_decay")
"""Settings of `training` on which the form of the optimizer's state depends."""


def parent_folder(experiment: Experiment, home: Home) -> RunFolder:
    """The run folder of a fork's parent."""
    return RunFolder(home.run(experiment.parent.run, experiment.parent.version))


def parent_checkpoint(experiment: Experiment, home: Home) -> Checkpoint:
    """The checkpoint that a fork continues from, its files not yet verified.

    Raises:
        MissingInputError: it is not there.
    """
    parent, folder = experiment.parent, parent_folder(experiment, home)
    if checkpoint := _milestone(folder, parent.milestone):
        return checkpoint
    tokens = format_tokens(parent.milestone)
    raise MissingInputError(
        f"{experiment.name} continues from {parent.run} at {tokens} tokens, a milestone that is not in "
        f"{folder.checkpoints}; with it among its milestones, `openlm train {parent.run} --until {tokens}` makes it"
    )


def _milestone(run: RunFolder, tokens: int) -> Checkpoint | None:
    label = milestone_label(tokens)
    return next((c for c in run.saved() if c.milestone == label), None)


def weights_identity(weights: Mapping[Path, float]) -> Tree:
    """What a run records of its initial weights: the hash of each checkpoint's content, and its coefficient.

    Raises:
        MissingInputError: a checkpoint is not there.
    """
    return [{"sha256": _digest(path), "coefficient": coefficient} for path, coefficient in weights.items()]


def _digest(path: Path) -> str:
    if not path.exists():
        raise MissingInputError(f"there is no checkpoint {path} to begin with")
    hashes = FileHashes()
    if path.is_file():
        return hashes.sha256(path)
    if not path.is_dir():
        raise MissingInputError(f"{path} is neither a file nor a folder of weights")
    if (path / INFO).is_file():
        return read_checkpoint(path).digest
    return fingerprint({p.name: hashes.sha256(p) for p in sorted(path.iterdir()) if p.is_file()})


def initial_weights(experiment: Experiment, home: Home) -> dict[Path, float]:
    """The checkpoint that a recipe's `init_from` names by its path, or as RUN@TOKENS or RUN/VERSION@TOKENS; with
    coefficient 1. Empty where it names none.

    Raises:
        ConfigError: what stands behind the @ is no number of tokens.
        MissingInputError: a run has no such milestone.
    """
    place = experiment.init_from
    if place is None:
        return {}
    path = Path(home.resolve(place))
    named, at, tokens = place.partition("@")
    name, _, version = named.partition("/")
    if not at or not name or "/" in version + tokens or path.exists():
        return {path: 1.0}
    run = RunFolder(home.run(name, version or "v1"))
    try:
        checkpoint = _milestone(run, parse_tokens(tokens))
    except ValueError as e:
        raise ConfigError(f"init_from={place}: {e}") from e
    if checkpoint:
        return {checkpoint.path: 1.0}
    raise MissingInputError(
        f"{experiment.name} begins with the weights of {place}, a milestone not in {run.checkpoints}"
    )


def pin_latest(experiment: Experiment, home: Home) -> int:
    """Tokens of the newest checkpoint of a run, which becomes a milestone that no rotation deletes.

    Raises:
        MissingInputError: the run has none.
    """
    run = RunFolder(home.run(experiment.name, experiment.version))
    if not (saved := run.saved()):
        raise MissingInputError(f"{experiment.name} has no checkpoint yet to fork from in {run.checkpoints}")
    newest = saved[-1]
    if newest.milestone is None:
        promote(newest, milestone_label(newest.tokens), {})
        return newest.tokens
    return dict(experiment.labelled_milestones()).get(newest.milestone, newest.tokens)


def _check_fork(experiment: Experiment, checkpoint: Checkpoint, run: RunFolder) -> None:
    """
    Raises:
        ConfigError: the fork has another model, or an optimizer that can't continue from the parent's.
    """
    theirs = recorded_config(checkpoint.path).model_dump()
    ours = experiment.model_config_resolved().model_dump()
    if changed := differences({**theirs, "seq_len": 0}, {**ours, "seq_len": 0}):
        raise ConfigError(f"a fork has its parent's model; here differ: {'; '.join(changed)}")
    before, now = run.identity["training"], settings_tree(experiment.training)
    parts = [{name: training.get(name) for name in _OF_THE_STATE} for training in (before, now)]
    if experiment.parent.optimizer == "keep" and (changed := differences(*parts)):
        raise ConfigError(
            f"the optimizer's state of the parent does not fit: {'; '.join(changed)}; parent.optimizer=reset begins "
            "with a new one"
        )


def parent_identity(experiment: Experiment, home: Home) -> Tree | None:
    """What a fork's identity holds of its parent: `checkpoint`, a digest, `tokens`, and `order`, what the parent's
    order of samples is made of; with `init_from` the digest of those weights; None where there is neither.

    For a parent that is gone it is what the fork recorded when it began. Forks with another mixture that the first
    release began have no `order`, and continue without one.

    Raises:
        MissingInputError: the parent is not there, and the fork never began.
        ConfigError: the parent's tokens are no whole number of the fork's steps; or its model or optimizer is another.
    """
    if experiment.parent is None:
        weights = initial_weights(experiment, home)
        return {"initial_weights": weights_identity(weights)} if weights else None
    own, settings = RunFolder(home.run(experiment.name, experiment.version)), settings_tree(experiment.parent)
    begun = own.identity if (own.path / "run.json").exists() else {}
    recorded = begun.get("parent", {})
    is_begun = all(recorded.get(name) == settings[name] for name in settings)
    try:
        checkpoint = parent_checkpoint(experiment, home)
    except MissingInputError:
        if not is_begun:
            raise
        return {name: recorded[name] for name in ("checkpoint", "tokens", "order") if name in recorded}
    batch = experiment.training.global_batch
    if checkpoint.tokens % batch:
        raise ConfigError(
            f"{experiment.name} begins after {checkpoint.tokens:,} tokens of {experiment.parent.run}, which is no "
            f"whole number of its steps of {batch:,} tokens; choose another training.global_batch"
        )
    if not is_begun:
        _check_fork(experiment, checkpoint, parent_folder(experiment, home))
    found = {"checkpoint": checkpoint.digest, "tokens": checkpoint.tokens}
    mixture = [(s.name, s.weight) for s in experiment.sources]
    if is_begun and "order" not in recorded and [(d["name"], d["weight"]) for d in begun["data"]] == mixture:
        return found
    return {**found, "order": order_record(parent_folder(experiment, home).identity, checkpoint.tokens)}
