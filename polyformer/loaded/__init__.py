"""The public face: load a model with all that belongs to it, use it, save it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from polyformer.exports import exports

if TYPE_CHECKING:
    from polyformer.loaded.files import load, load_to_write, read_spec, save
    from polyformer.loaded.model import Loaded

__all__ = ["Loaded", "load", "load_to_write", "read_spec", "save"]

exports(
    __name__,
    {
        "files": "load load_to_write read_spec save",
        "model": "Loaded",
    },
)
