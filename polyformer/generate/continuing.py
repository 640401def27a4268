"""Continuing texts, or answering sources, all together in an engine."""

from __future__ import annotations

from collections.abc import Sequence

from polyformer.errors import SpecError
from polyformer.generate.engine import Capacity, Engine
from polyformer.generate.requests import Answer, Request
from polyformer.generate.sampling import Sampling
from polyformer.generate.slots import runner_of
from polyformer.parts.model import TransformerPart

TOGETHER = 16
"""Texts that are written at the same time; on a processor, more of them are no faster."""


def continue_texts(
    model: TransformerPart,
    prompts: Sequence[Sequence[int]],
    settings: Sampling,
    ends: Sequence[int],
    sources: Sequence[Sequence[int]] | None = None,
) -> list[Answer]:
    """Continue prompts, all together; each as it would be continued alone.

    Args:
        prompts: ids, each at least one; for an encoder–decoder what its decoder begins with.
        ends: the tokens that end a text.
        sources: ids for the encoder, where there is one.
    Raises:
        SpecError: a model that writes no texts, an empty prompt, one that is longer than the model's positions, or an
            id that is not in the vocabulary.
        RunError: scores that are no numbers.
    """
    if not prompts:
        raise SpecError("each prompt must have at least one token")
    engine = Engine(runner_of(model, min(TOGETHER, len(prompts))), Capacity(waiting=len(prompts)))
    given: Sequence[Sequence[int] | None] = sources or [None] * len(prompts)
    handles = [
        engine.submit(Request(prompt, settings.replace(seed=settings.seed + i), ends, source))
        for i, (prompt, source) in enumerate(zip(prompts, given, strict=True))
    ]
    return [handle.result() for handle in handles]
