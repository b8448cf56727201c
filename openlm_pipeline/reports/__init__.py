"""Reports: one table object, its renderings, and a self-contained page with charts."""

from openlm_pipeline.reports.render import write_report
from openlm_pipeline.reports.rows import milestones_table
from openlm_pipeline.reports.table import Table

__all__ = ["Table", "milestones_table", "write_report"]
