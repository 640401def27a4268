"""The public face: load a model with all that belongs to it, use it, save it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from polyformer.exports import exports

if TYPE_CHECKING:
    from polyformer.loaded.files import load, load_to_write, read_spec, save
    from polyformer.loaded.model import Loaded
    from polyformer.loaded.start import open_writer
    from polyformer.loaded.writer import Writer

__all__ = ["Loaded", "Writer", "load", "load_to_write", "open_writer", "read_spec", "save"]

exports(
    __name__,
    {
        "files": "load load_to_write read_spec save",
        "model": "Loaded",
        "start": "open_writer",
        "writer": "Writer",
    },
)
