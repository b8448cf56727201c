"""Which sample is the i-th of a run, as pure functions of an index."""

from openlm_pipeline.ordering.order import DataOrder

__all__ = ["DataOrder"]
