"""What Dagster loads from any folder, as `-m openlm_pipeline.cli.definitions`."""

import importlib

from openlm_pipeline.runs.programs import look_there_first

look_there_first()
defs = importlib.import_module("orchestration.definitions").defs
