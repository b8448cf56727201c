"""openlm_pipeline: raw text to scorecards as one reproducible pipeline. This package never imports Dagster."""

__version__ = "0.1.0"
