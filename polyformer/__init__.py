"""polyformer: one small core in which every published Transformer is a short specification."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from polyformer.errors import DataError, PolyformerError, RunError, SpecError, WeightsError
    from polyformer.loaded import Loaded, load, save
    from polyformer.spec import Record, Spec, rewrite, walk
    from polyformer.swap.transplant import transplant

__version__ = "0.1.0"

__all__ = [
    "DataError",
    "Loaded",
    "PolyformerError",
    "Record",
    "RunError",
    "Spec",
    "SpecError",
    "WeightsError",
    "load",
    "rewrite",
    "save",
    "transplant",
    "walk",
]

_HOMES = {
    **dict.fromkeys(("DataError", "PolyformerError", "RunError", "SpecError", "WeightsError"), "polyformer.errors"),
    **dict.fromkeys(("Loaded", "load", "save"), "polyformer.loaded"),
    **dict.fromkeys(("Record", "Spec", "rewrite", "walk"), "polyformer.spec"),
    "transplant": "polyformer.swap",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: `import polyformer` itself costs nothing, not even PyTorch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'polyformer' has no attribute '{name}'")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
