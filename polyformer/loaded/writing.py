"""From texts and conversations to what the engine is asked."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from polyformer.errors import SpecError

if TYPE_CHECKING:
    from polyformer.data.chat import Message
    from polyformer.data.checkpoint_tokenizer import TextTokenizer
    from polyformer.data.tokenizer import TextPairTokenizer
    from polyformer.generate import Capacity, Engine, Guesser, Request, Runner, Sampling
    from polyformer.loaded.model import Loaded
    from polyformer.native.machine import Machine, NativeModel


LONGEST = 2**15
"""Tokens of a text at most, where it is written natively."""


class TargetDecoder:
    """Turns a decoder's tokens into text, by a tokenizer of pairs.

    Its text is given out when it is whole: such a tokenizer may tidy up what it has decoded.
    """

    def __init__(self, tokenizer: TextPairTokenizer) -> None:
        self.tokenizer = tokenizer

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids."""
        return self.tokenizer.decode_target(ids)

    def settled(self, token: int) -> bool:
        """Nothing is, before the end."""
        return False


def context_of(loaded: Loaded) -> int | None:
    """Return how many tokens a decoder was made for, where its spec doesn't say so, as rotary positions have no end."""
    if loaded.model.encoder is not None:
        return None
    found = getattr(loaded.family, "max_position_embeddings", None)
    return found if isinstance(found, int) else None


def runner_for(loaded: Loaded, slots: int, blocks: int | None = None) -> Runner:
    """Return what runs the model, or so many of its first blocks if they are all it has.

    It runs natively, if it was loaded for that, or else in PyTorch.
    """
    from polyformer.generate import runner_of

    if loaded.native is None:
        return runner_of(loaded.model, slots, context_of(loaded))
    from polyformer.native.machine import NativeState
    from polyformer.native.runner import NativeRunner

    machine = machine_for(slots, context_of(loaded))
    return NativeRunner(NativeState(_packed(loaded, machine, blocks), machine))


def _packed(loaded: Loaded, machine: Machine, blocks: int | None) -> NativeModel:
    """Return the model as it runs natively, packed once as long as no weight is changed."""
    from polyformer.native.runner import packed

    assert loaded.native is not None
    parameters = list(loaded.model.parameters())
    state = (loaded.native, blocks, tuple((one.data_ptr(), one._version) for one in parameters if not one.is_meta))
    if loaded.packed is None or loaded.packed[0] != state:
        only_on_disk = any(one.is_meta for one in parameters)
        model = loaded.folder if only_on_disk and loaded.folder is not None else loaded.model
        loaded.packed = state, packed(model, loaded.native, machine, blocks)
    return loaded.packed[1]


def machine_for(slots: int, context: int | None) -> Machine:
    """Return how a model is run natively that was made for texts of so many tokens; None is of any length."""
    from polyformer.native.machine import Machine, processors

    return Machine(slots, min(context or LONGEST, LONGEST), processors())


def engine_for(loaded: Loaded, slots: int, capacity: Capacity | None, guess: str | None = None) -> Engine:
    """Return an engine; raises `SpecError` for a way of guessing that isn't known."""
    from polyformer.generate import Engine

    guesser = None if guess is None else guesser_for(loaded, slots, guess)
    return Engine(runner_for(loaded, slots), capacity, guesser)


def guesser_for(loaded: Loaded | None, slots: int, guess: str) -> Guesser:
    """Return what guesses tokens; raises `SpecError` for a way that isn't known, or that needs a model in memory."""
    from polyformer.generate import Draft, PromptLookup

    way, _, value = guess.partition("=")
    if guess == "lookup":
        return PromptLookup()
    if loaded is None:
        raise SpecError(f"only lookup guesses where a model is run from its file, not '{guess}'; load it to write")
    if way == "early" and value.isdecimal():
        return Draft(*_early(loaded, slots, int(value)))
    if way == "draft" and value:
        return Draft(*_smaller(loaded, slots, value))
    raise SpecError(f"tokens are guessed by lookup, early=BLOCKS or draft=MODEL, not '{guess}'")


def _early(loaded: Loaded, slots: int, blocks: int) -> tuple[Runner, float]:
    """Return what runs the first blocks, and what a pass of it costs."""
    from polyformer.generate import early_exit
    from polyformer.parts.model import parameters_of

    draft = early_exit(loaded.model, blocks)
    cost = parameters_of(draft) / parameters_of(loaded.model)
    return runner_for(dataclasses.replace(loaded, model=draft), slots, blocks), cost


def _smaller(loaded: Loaded, slots: int, path: str) -> tuple[Runner, float]:
    """Return what runs another model of the same vocabulary, and what a pass of it costs."""
    from polyformer.loaded.files import load_to_write
    from polyformer.parts.model import parameters_of

    other = load_to_write(path)
    runner, wanted = runner_for(other, slots), loaded.spec.head
    vocabulary = None if wanted is None else getattr(getattr(wanted, "projection", None), "outputs", None)
    if vocabulary != runner.vocabulary:
        raise SpecError(f"{path} guesses among {runner.vocabulary} tokens, but the model has {vocabulary}")
    return runner, parameters_of(other.model) / parameters_of(loaded.model)


def requests_for(loaded: Loaded, texts: Sequence[str], settings: Sampling) -> list[Request]:
    """Return what continues texts or, with an encoder–decoder, answers them; each draws from a seed of its own."""
    if loaded.model.decoder is None:
        raise SpecError("writing a text needs a decoder with a language model head; this model has none")
    if loaded.model.encoder is None:
        return continuing(loaded, _prompted(loaded, loaded.texts.encode_batch(list(texts))), settings)
    from polyformer.generate import Request

    pairs = loaded.pairs
    first = loaded.generation.forced_bos_token_id
    start = [pairs.bos_id] if first is None else [pairs.bos_id, first]
    decoder = loaded.text_tokenizer or TargetDecoder(pairs)
    return [
        Request(start, settings.replace(seed=settings.seed + i), (pairs.eos_id,), source, decoder)
        for i, source in enumerate(pairs.encode_sources(list(texts), [None] * len(texts)))
    ]


def chat_requests_for(loaded: Loaded, conversations: Sequence[Sequence[Message]], settings: Sampling) -> list[Request]:
    """Return what answers conversations by the model's chat template."""
    if loaded.model.encoder is not None:
        raise SpecError("a conversation needs a decoder-only model; this one has an encoder (see generate)")
    return continuing(loaded, _prompted(loaded, chat_rows(loaded.texts, conversations)), settings)


def _prompted(loaded: Loaded, rows: Sequence[Sequence[int]]) -> list[list[int]]:
    """Put the ids of a trained prompt before each text."""
    return [[*loaded.before, *row] for row in rows]


def chat_rows(texts: TextTokenizer, conversations: Sequence[Sequence[Message]]) -> list[list[int]]:
    """Return the ids of conversations, up to where they are answered."""
    from polyformer.data.chat import encode_chat

    return [encode_chat(texts, list(messages)) for messages in conversations]


class Continues(Protocol):
    """What continues texts: a model that was loaded, or a writer."""

    @property
    def texts(self) -> TextTokenizer:
        """The tokenizer; raises `SpecError` if there is none."""

    def ends(self) -> tuple[int, ...]:
        """The tokens that end a text."""


def continuing(loaded: Continues, rows: Sequence[Sequence[int]], settings: Sampling) -> list[Request]:
    """Return what continues ids."""
    from polyformer.generate import Request

    ends, decoder = loaded.ends(), loaded.texts
    return [Request(row, settings.replace(seed=settings.seed + i), ends, decoder=decoder) for i, row in enumerate(rows)]
