"""Import first: lets PyPI's torchvision, which is linked to CUDA, be imported under a torch without CUDA.

Its library can't be loaded there, so two operators that its Python code refers to on import do not exist, and composer
can't be imported. Declaring them is enough: scoring text calls neither. Does nothing where the library loads.
"""

import importlib.util
from pathlib import Path

import torch


def _declare_operators() -> torch.library.Library | None:
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        return None
    try:
        torch.ops.load_library(str(Path(spec.origin).with_name("_C.so")))
    except OSError:
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        return library
    return None


declared = _declare_operators()
"""Kept, because the operators go away with it."""
