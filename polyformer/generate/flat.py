"""Sampling settings as a flat table of names and values, as a command line or a request over the network has them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from polyformer.errors import SpecError, suggest
from polyformer.generate.processors import (
    BadWords,
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
from polyformer.generate.sampling import Sampling
from polyformer.spec import field_types


def _biases(value: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping) or not all(str(token).isdigit() for token in value):
        raise SpecError(f"logit_bias should be a table of token ids and numbers, not {value!r}")
    return {"biases": [{"sequence": [int(token)], "bias": bias} for token, bias in value.items()]}


KEYS: Mapping[str, tuple[type[Processor], Callable[[Any], dict[str, Any]]]] = {
    "bad_words_ids": (BadWords, lambda value: {"sequences": value}),
    "begin_suppress_tokens": (SuppressFirst, lambda value: {"ids": value}),
    "frequency_penalty": (FrequencyPenalty, lambda value: {"penalty": value}),
    "logit_bias": (LogitBias, _biases),
    "min_new_tokens": (MinimumLength, lambda value: {"count": value}),
    "min_p": (MinP, lambda value: {"share": value}),
    "no_repeat_ngram_size": (NoRepeatNgram, lambda value: {"size": value}),
    "presence_penalty": (PresencePenalty, lambda value: {"penalty": value}),
    "repetition_penalty": (RepetitionPenalty, lambda value: {"penalty": value}),
    "suppress_tokens": (Suppress, lambda value: {"ids": value}),
    "typical_p": (Typical, lambda value: {"mass": value}),
}
"""The ecosystem's names of processors, and what their values say."""

OWN = tuple(name for name in field_types(Sampling) if name != "processors")


def sampling_of(asked: Mapping[str, Any], where: str = "sampling") -> Sampling:
    """Read settings such as `{"temperature": 0.7, "min_p": 0.05, "stop": ["\\n"]}`.

    Args:
        where: what to call the table in errors.
    Raises:
        SpecError: an unknown name (the nearest is told), or a value that can't be.
    """
    unknown = next((name for name in asked if name not in KEYS and name not in OWN), None)
    if unknown is not None:
        raise SpecError(f"{where} knows no '{unknown}'{suggest(unknown, (*OWN, *KEYS))}")
    processors = [processor_of(name, value, where) for name, value in asked.items() if name in KEYS]
    own = Sampling.from_data({name: value for name, value in asked.items() if name in OWN}, where)
    return own.replace(processors=tuple(processors))


def processor_of(name: str, value: Any, where: str) -> Processor:
    """Make one processor by its name in the ecosystem."""
    kind, data = KEYS[name]
    return kind.from_data(data(value), f"{where}.{name}")
