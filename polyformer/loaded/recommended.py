"""What a checkpoint's generation settings ask for, as processors and groups of ours."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from polyformer.errors import SpecError
from polyformer.families.generation import Generation
from polyformer.generate import Diverse, MinimumLength, Processor, sampling_of

PROCESSORS = ("begin_suppress_tokens", "no_repeat_ngram_size", "repetition_penalty", "suppress_tokens")
"""Keys that are processors under the same name here."""

FOR_DRAWING = frozenset(("do_sample", "min_p", "temperature", "top_k", "top_p", "typical_p"))
"""Keys that say nothing to a search."""

OTHERS: Mapping[str, Callable[[int], Processor]] = {
    "min_length": lambda length: MinimumLength(max(length - 1, 0)),  # the start token counts there
    "min_new_tokens": MinimumLength,
}

SPARED = FOR_DRAWING | {
    "renormalize_logits",  # would share out the forbidden tokens' probability, and choose the same next token
    "num_beam_groups",
    "diversity_penalty",
    *PROCESSORS,
    *OTHERS,
}


def recommended_processors(said: Generation) -> tuple[Processor, ...]:
    """Return the processors that a checkpoint asks a search for.

    Raises:
        SpecError: it asks for something that isn't known here.
    """
    others = said.others_by_name
    unknown = next((f"{key} = {value}" for key, value in others.items() if key not in SPARED), None)
    if unknown is not None:
        told = f"the checkpoint recommends a search with {unknown}, unknown here; give settings of your own"
        raise SpecError(told)
    asked: dict[str, Any] = {key: others[key] for key in PROCESSORS if key in others}
    longer = [ids for ids in said.bad_words_ids or () if len(ids) > 1]  # single ones are simply forbidden
    if longer:
        asked["bad_words_ids"] = longer
    return (
        *sampling_of(asked, "the checkpoint").processors,
        *(OTHERS[key](others[key]) for key in OTHERS if key in others),
    )


def recommended_groups(said: Generation) -> Diverse | None:
    """Return the groups of beams that a checkpoint asks for."""
    groups = said.others_by_name.get("num_beam_groups", 1)
    return None if groups == 1 else Diverse(groups, float(said.others_by_name.get("diversity_penalty", 0.0)))
