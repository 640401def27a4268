"""From texts and conversations to what the engine is asked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from polyformer.errors import SpecError

if TYPE_CHECKING:
    from polyformer.data.chat import Message
    from polyformer.data.tokenizer import TextPairTokenizer
    from polyformer.generate import Capacity, Engine, Guesser, Request, Runner, Sampling
    from polyformer.loaded.model import Loaded

ROOM = 2048
"""Tokens that a sequence may have natively, where the model sets no bound."""


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


def runner_for(loaded: Loaded, slots: int, runtime: str) -> Runner:
    """Return what runs the model: in PyTorch, or natively, where a GGUF file's blocks are taken as they are stored."""
    import torch

    from polyformer.generate import runner_of
    from polyformer.generate.search import positions_of

    context = context_of(loaded)
    if runtime == "torch":
        return runner_of(loaded.model, slots, context)
    if runtime != "native":
        raise SpecError(f"models run in torch or native, not '{runtime}'")
    from polyformer.native.machine import Machine
    from polyformer.native.runner import runner

    room = context or positions_of(loaded.spec.target) or ROOM
    machine = Machine(slots, room, torch.get_num_threads())
    file = loaded.folder
    is_file = file is not None and file.suffix.lower() == ".gguf" and file.is_file()
    return runner(file if is_file and file is not None else loaded.model, machine=machine)


def engine_for(
    loaded: Loaded, slots: int, capacity: Capacity | None, guess: str | None = None, runtime: str = "torch"
) -> Engine:
    """Return an engine; raises `SpecError` for a way of guessing, or a runtime, that isn't known."""
    from polyformer.generate import Engine

    runner = runner_for(loaded, slots, runtime)
    return Engine(runner, capacity, None if guess is None else _guesser(loaded, slots, guess))


def _guesser(loaded: Loaded, slots: int, guess: str) -> Guesser:
    from polyformer.generate import Draft, PromptLookup, TorchRunner, early_exit
    from polyformer.parts.model import parameters_of

    if guess == "lookup":
        return PromptLookup()
    if not guess.isdigit():
        raise SpecError(f"tokens are guessed by lookup or a number of blocks, not '{guess}'")
    draft = early_exit(loaded.model, int(guess))
    cost = parameters_of(draft) / parameters_of(loaded.model)
    return Draft(TorchRunner(draft, slots, context_of(loaded)), cost)


def requests_for(loaded: Loaded, texts: Sequence[str], settings: Sampling) -> list[Request]:
    """Return what continues texts or, with an encoder–decoder, answers them; each draws from a seed of its own."""
    if loaded.model.decoder is None:
        raise SpecError("writing a text needs a decoder with a language model head; this model has none")
    if loaded.model.encoder is None:
        return continuing(loaded, loaded.texts.encode_batch(list(texts)), settings)
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
    from polyformer.data.chat import encode_chat

    if loaded.model.encoder is not None:
        raise SpecError("a conversation needs a decoder-only model; this one has an encoder (see generate)")
    rows = [encode_chat(loaded.texts, list(messages)) for messages in conversations]
    return continuing(loaded, rows, settings)


def continuing(loaded: Loaded, rows: Sequence[Sequence[int]], settings: Sampling) -> list[Request]:
    """Return what continues ids."""
    from polyformer.generate import Request

    ends, decoder = loaded.ends(), loaded.texts
    return [Request(row, settings.replace(seed=settings.seed + i), ends, decoder=decoder) for i, row in enumerate(rows)]
