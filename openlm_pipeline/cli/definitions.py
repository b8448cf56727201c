"""What Dagster loads from any folder, as `-m openlm_pipeline.cli.definitions`."""

import gc
import importlib

from openlm_pipeline.runs.programs import look_there_first

look_there_first()
gc.disable()  # what is loaded stays: a collection meanwhile or at the end would look through all of it for nothing
try:
    defs = importlib.import_module("orchestration.definitions").defs
finally:
    gc.freeze()
    gc.enable()
