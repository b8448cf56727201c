"""The stages as plain functions, one module per leg: what both the `openlm` command and the Dagster assets call."""
