"""From a model to its output: greedy and beam search, and translation of texts."""

from polyformer.generate.search import search
from polyformer.generate.settings import (
    Gnmt,
    Hopeful,
    Hypothesis,
    LengthPenalty,
    Limit,
    Power,
    Safe,
    Search,
    SpecialTokens,
    Stopping,
)
from polyformer.generate.translate import Translation, translate

__all__ = [
    "Gnmt",
    "Hopeful",
    "Hypothesis",
    "LengthPenalty",
    "Limit",
    "Power",
    "Safe",
    "Search",
    "SpecialTokens",
    "Stopping",
    "Translation",
    "search",
    "translate",
]
