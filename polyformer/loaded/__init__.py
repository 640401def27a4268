"""The public face: load a model with all that belongs to it, use it, save it."""

from polyformer.loaded.files import load, save
from polyformer.loaded.model import Loaded

__all__ = ["Loaded", "load", "save"]
