"""Which sample is the i-th of a run, as pure functions of an index."""

from openlm_pipeline.ordering.order import Order, make_order

__all__ = ["Order", "make_order"]
