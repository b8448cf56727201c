"""Training as a plain function: the milestones of a run that are not there, made by its launcher.

It looks at what is on disk, does only what is missing or no longer matches, and says what it reused.
"""

from collections.abc import Collection, Iterator
from pathlib import Path

from openlm_pipeline.checkpoints.folders import KEEP_DAMAGED, Checkpoint, verify
from openlm_pipeline.errors import BusyError, DataError, IdentityError
from openlm_pipeline.experiments import Experiment
from openlm_pipeline.fingerprint import Tree
from openlm_pipeline.pipeline.data import dataset_versions
from openlm_pipeline.pipeline.preflight import preflight
from openlm_pipeline.result import Finding, Say, StageResult, refusal, refuse
from openlm_pipeline.runs.folder import RunFolder
from openlm_pipeline.runs.identity import run_identity
from openlm_pipeline.runs.launch import (
    Event,
    MilestoneReached,
    MilestoneReused,
    is_there,
    launcher_of,
    milestone_checkpoints,
    train_run,
)
from openlm_pipeline.runs.parent import parent_folder, parent_identity
from openlm_pipeline.runs.upload import push_run
from openlm_pipeline.storage.files import set_aside
from openlm_pipeline.storage.home import Home


def _identity(experiment: Experiment, home: Home) -> Tree:
    """Identity of the run that an experiment is, on the data and the parent that are there."""
    if experiment.parent:
        home.pull(parent_folder(experiment, home).path)
    return run_identity(experiment, dataset_versions(experiment, home), parent_identity(experiment, home))


def open_run(experiment: Experiment, home: Home) -> RunFolder:
    """The run folder of an experiment, which must be this experiment's on the data that is there.

    Raises:
        IdentityError: the run there was made from other settings or data; the message names what differs.
    """
    run = RunFolder(home.run(experiment.name, experiment.version))
    home.pull(run.path)
    identity = _identity(experiment, home)
    if not run.belongs_to(identity):
        changed = "\n  ".join(run.differences(identity))
        raise IdentityError(f"{run.path} was trained from something else:\n  {changed}\nTrain it again first.")
    return run


def is_intact(checkpoint: Checkpoint) -> bool:
    """Whether every file of a checkpoint has its recorded hash."""
    try:
        verify(checkpoint)
    except DataError:
        return False
    return True


def checkpoint_result(checkpoint: Checkpoint, reused: bool) -> StageResult:
    """A milestone as the result of a stage."""
    facts = {"step": checkpoint.step, "tokens": checkpoint.tokens, **checkpoint.metrics}
    facts["bytes"] = sum(f["bytes"] for f in checkpoint.files.values())
    if checkpoint.weights_digest is not None:
        facts["weights_digest"] = checkpoint.weights_digest
    return StageResult(checkpoint.path, checkpoint.digest, reused, facts)


def train(
    experiment: Experiment, home: Home, until: int, report: Say, *, allow: Collection[str] = ()
) -> Iterator[MilestoneReused | Event]:
    """Train every milestone up to `until` tokens that is not there, and on to `until`, with torchrun; yields what
    happens as it happens.

    Closing the iterator stops the trainer, which first saves a checkpoint.

    Args:
        allow: consents, see `result.CONSENTS`. Only with `remake` the milestones that are there are hashed; otherwise
            their sizes are compared, and who loads one compares its hashes.

    Raises:
        ConsentError: the folder holds another run, a milestone is damaged, or training needs a consent.
        IdentityError: the folder holds this run with a schedule that ended.
        MissingInputError: the data, or the parent of a fork, is not there.
        BusyError: the run is being trained already.
        TrainingError: training ended early.
    """
    run = RunFolder(home.run(experiment.name, experiment.version))
    home.pull(run.path)
    identity = _identity(experiment, home)
    training = launcher_of(experiment, home, run).find() is not None
    if training and not run.belongs_to(identity):
        differing = "\n  ".join(run.differences(identity))
        raise BusyError(f"a job on the cluster trains {run.path} from something else:\n  {differing}\nCancel it first.")
    wanted = {label for label, tokens in experiment.labelled_milestones() if tokens <= until}
    there, damaged = _milestones(experiment, run, identity, wanted, hashes="remake" in allow)
    is_done = not wanted - set(there) and run.belongs_to(identity) and is_there(experiment, run, until)
    if not is_done:  # looked at before anything is set aside
        makes = [f"checkpoint/{experiment.name}/{label}" for label in wanted - set(there) or {"until"}]
        needs = [] if training else preflight(experiment, home, makes, until)
        refuse(filter(None, [run.superseded_by(experiment, identity, allow), *damaged.values(), *needs]), allow)
        for finding in needs:
            if finding.level == "warning":
                report(finding.line())
    changed: list[str] = []
    if not training:
        with run.lock():  # so that the folder of a run that is training is not set aside under it
            changed = run.claim(experiment, identity, allow)
    if changed:
        report(f"the run that was in {run.path} is set aside. What changed: {'; '.join(changed)}")
    for path, finding in damaged.items():
        report(f"{finding.what}. It is made again; what is left of it: {set_aside(path)}")
    for label, checkpoint in there.items():
        report(f"milestone {label} reused")
        yield MilestoneReused(label, checkpoint)
    push_run(home, run)
    if not is_done:
        for event in train_run(experiment, home, run, until, report, told=there, allow=allow):
            if isinstance(event, MilestoneReached):
                push_run(home, run, event.checkpoint)
            yield event
        push_run(home, run)


def _milestones(
    experiment: Experiment, run: RunFolder, identity: Tree, wanted: Collection[str], hashes: bool
) -> tuple[dict[str, Checkpoint], dict[Path, Finding]]:
    """The milestones of `wanted` that are whole, by label, and a finding for the folder of each that is damaged.

    Args:
        hashes: compare hashes, not sizes alone.
    """
    whole: dict[str, Checkpoint] = {}
    damaged: dict[Path, Finding] = {}
    if not run.belongs_to(identity):
        return whole, damaged
    for label, checkpoint in milestone_checkpoints(experiment, run).items():
        if label not in wanted:
            continue
        try:
            verify(checkpoint, hashes=hashes)
        except DataError as e:
            what = f"milestone {label} is damaged: {e}"
            damaged[checkpoint.path] = refusal("remake", what, KEEP_DAMAGED)
        else:
            whole[label] = checkpoint
    return whole, damaged
