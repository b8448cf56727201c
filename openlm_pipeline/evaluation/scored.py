"""What scores are filed under: a digest of the weights, with what else changes them."""

from openlm_pipeline.checkpoints.folders import Checkpoint
from openlm_pipeline.fingerprint import fingerprint


def scored_digest(weights: str, precision: str, average: str | None = None) -> str:
    """Digest of weights with what else changes their scores; that of the weights alone by default."""
    if precision == "fp32" and average is None:
        return weights
    return fingerprint({"weights": weights, "precision": precision, "average": average})


def milestone_digest(checkpoint: Checkpoint, precision: str, average: str | None = None) -> str:
    """What the scores of a run's checkpoint are filed under: the same for the same weights, whatever files have them.

    Of averages, and of a checkpoint of an earlier release, no digest of weights is recorded: then it is the files'.
    """
    of_weights = checkpoint.weights_digest if average is None else None
    return scored_digest(of_weights or checkpoint.digest, precision, average)
