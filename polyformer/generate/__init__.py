"""From a model to its output: greedy and beam search, sampling, and translation of texts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from polyformer.exports import exports

if TYPE_CHECKING:
    from polyformer.generate.continuing import TOGETHER, continue_texts
    from polyformer.generate.engine import Capacity, Engine
    from polyformer.generate.flat import sampling_of
    from polyformer.generate.forests import Text
    from polyformer.generate.processors import (
        BadWords,
        Biased,
        FrequencyPenalty,
        LogitBias,
        MinimumLength,
        MinP,
        NoRepeatNgram,
        PresencePenalty,
        Processor,
        RepetitionPenalty,
        Suppress,
        SuppressFirst,
        Typical,
    )
    from polyformer.generate.requests import Answer, Delta, Handle, Request
    from polyformer.generate.runner import Counts, Rows, Runner
    from polyformer.generate.sampling import Sampling, Scored
    from polyformer.generate.search import search, search_slots
    from polyformer.generate.settings import (
        Diverse,
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
    from polyformer.generate.slots import TorchRunner, runner_of
    from polyformer.generate.speculative import Draft, Guesser, Guesses, PromptLookup, Speculation, early_exit
    from polyformer.generate.texts import Decoder, TextStream
    from polyformer.generate.translate import Translation, translate

__all__ = [
    "TOGETHER",
    "Answer",
    "BadWords",
    "Biased",
    "Capacity",
    "Counts",
    "Decoder",
    "Delta",
    "Diverse",
    "Draft",
    "Early",
    "Engine",
    "FrequencyPenalty",
    "Gnmt",
    "Guesser",
    "Guesses",
    "Handle",
    "Hopeful",
    "Hypothesis",
    "LengthPenalty",
    "Limit",
    "LogitBias",
    "MinP",
    "MinimumLength",
    "NoRepeatNgram",
    "Power",
    "PresencePenalty",
    "Processor",
    "PromptLookup",
    "RepetitionPenalty",
    "Request",
    "Rows",
    "Runner",
    "Safe",
    "Sampling",
    "Scored",
    "Search",
    "SpecialTokens",
    "Speculation",
    "Stopping",
    "Suppress",
    "SuppressFirst",
    "Text",
    "TextStream",
    "TorchRunner",
    "Translation",
    "Typical",
    "continue_texts",
    "early_exit",
    "runner_of",
    "sampling_of",
    "search",
    "search_slots",
    "translate",
]

exports(
    __name__,
    {
        "continuing": "TOGETHER continue_texts",
        "engine": "Capacity Engine",
        "flat": "sampling_of",
        "forests": "Text",
        "processors": "BadWords Biased FrequencyPenalty LogitBias MinimumLength MinP NoRepeatNgram PresencePenalty "
        "Processor RepetitionPenalty Suppress SuppressFirst Typical",
        "requests": "Answer Delta Handle Request",
        "runner": "Counts Rows Runner",
        "sampling": "Sampling Scored",
        "search": "search search_slots",
        "settings": "Diverse Early Gnmt Hopeful Hypothesis LengthPenalty Limit Power Safe Search SpecialTokens "
        "Stopping",
        "slots": "TorchRunner runner_of",
        "speculative": "Draft Guesser Guesses PromptLookup Speculation early_exit",
        "texts": "Decoder TextStream",
        "translate": "Translation translate",
    },
)
