"""The `openlm` command: thin commands over `openlm_pipeline.pipeline`."""
