"""All about checkpoints on disk: folders, loading of every kind, export to OpenLM and Hugging Face.

Importing this package does not import torch; what needs it is imported when it is used.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from openlm_pipeline.checkpoints.loading import FoundModel, find_model_config, load_checkpoint
    from openlm_pipeline.checkpoints.model_export import export_huggingface, export_openlm

__all__ = ["FoundModel", "export_huggingface", "export_openlm", "find_model_config", "load_checkpoint"]

_MODULES = {
    "FoundModel": "loading",
    "export_huggingface": "model_export",
    "export_openlm": "model_export",
    "find_model_config": "loading",
    "load_checkpoint": "loading",
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
