"""Which sample is the i-th of a run, as pure functions of an index."""

from openlm_pipeline.ordering.openlm_modes import ManifestOrder, ResampledOrder
from openlm_pipeline.ordering.order import DataOrder, Order, Sampling, make_order
from openlm_pipeline.ordering.windowed import WindowedOrder

__all__ = ["DataOrder", "ManifestOrder", "Order", "ResampledOrder", "Sampling", "WindowedOrder", "make_order"]
