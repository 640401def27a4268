"""From a model to its output: greedy and beam search, sampling, and translation of texts."""

from polyformer.generate.sampling import Continuation, Sampling, continue_texts
from polyformer.generate.search import search
from polyformer.generate.settings import (
    Early,
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
    "Continuation",
    "Early",
    "Gnmt",
    "Hopeful",
    "Hypothesis",
    "LengthPenalty",
    "Limit",
    "Power",
    "Safe",
    "Sampling",
    "Search",
    "SpecialTokens",
    "Stopping",
    "Translation",
    "continue_texts",
    "search",
    "translate",
]
