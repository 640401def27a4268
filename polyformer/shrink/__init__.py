"""Models made smaller: matrices in four bits an element, and what is held in blocks of codes."""

from polyformer.shrink.linear4 import Linear4
from polyformer.shrink.quantise import Dequantise, Quantise

__all__ = ["Dequantise", "Linear4", "Quantise"]
