"""polyformer: one small core in which every published Transformer is a short specification."""

from __future__ import annotations

from typing import TYPE_CHECKING

from polyformer.exports import exports

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

exports(
    __name__,
    {
        "errors": "DataError PolyformerError RunError SpecError WeightsError",
        "loaded": "Loaded load save",
        "spec": "Record Spec rewrite walk",
        "swap": "transplant",
    },
)
