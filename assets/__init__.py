"""Dagster assets and checks: thin. Each calls one function of `openlm_pipeline.stages` and reports what it gave."""
