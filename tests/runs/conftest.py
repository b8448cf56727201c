"""Fixtures of the tests of runs."""

from slurm_cluster import slurm_cluster

__all__ = ["slurm_cluster"]
