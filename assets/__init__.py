"""Dagster assets and checks: thin. Each calls one function of `openlm_pipeline.pipeline` and reports what it gave.

The graph shows only the last part of a key, so the stage is also one of an asset's kinds.
"""
