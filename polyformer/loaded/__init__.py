"""The public face: load a model with all that belongs to it, use it, save it."""

from polyformer.loaded.files import load, load_to_write, read_spec, save
from polyformer.loaded.model import Loaded

__all__ = ["Loaded", "load", "load_to_write", "read_spec", "save"]
