"""Prefixes and prompts as changes of a spec: what a tuned model has read before every text."""

from __future__ import annotations

from typing import Literal

from polyformer.errors import SpecError
from polyformer.parts import (
    Adapted,
    Adapter,
    Attention,
    Embed,
    MadePrefix,
    Prefix,
    Prompt,
    Stack,
    TokenEmbedding,
    Transformer,
)
from polyformer.spec import Spec, walk
from polyformer.swap.origins import Moves
from polyformer.swap.swap import Swap
from polyformer.tune.changes import AddAdapters, Placed, Shared
from polyformer.tune.targets import standing

Side = Literal["encoder", "decoder"]


class PrefixChange(Swap):
    """Trained keys and values before every self-attention's own (P-Tuning v2; Li and Liang 2021).

    Attributes:
        name: what the adapter is called.
        tokens: how long the prefix is.
        hidden: width of the hidden layer of a network that makes the prefixes, from rows as wide as keys; None trains
            them themselves.
        side: where they stand; None is the decoder, or the encoder of a model that has no other.
    """

    name: str = "default"
    tokens: int = 20
    hidden: int | None = None
    side: Side | None = None

    def check(self) -> None:
        self.require(self.tokens > 0, f"a prefix of {self.tokens} tokens is none; tokens must be at least 1")
        self.require(self.hidden is None or self.hidden > 0, "hidden must be at least 1")

    def placed(self, spec: Transformer) -> AddAdapters:
        """Return what it comes to for a model; raises `SpecError` for one whose attention takes no prefix."""
        found = []
        attentions = attentions_of(spec, self.side)
        for path, attention in attentions.items():
            width = attention.heads.groups * attention.heads.width
            own: Prefix = Prefix(self.name, 1.0, self.tokens, width)
            if self.hidden is not None:
                own = MadePrefix.of_widths(self.name, self.tokens, width, width, self.hidden)
            found.append(Placed(path, own))
        common = ("rows", "first.weight", "first.bias") if self.hidden is not None and len(found) > 1 else ()
        return AddAdapters(tuple(found), tuple(Shared(tuple(attentions), name) for name in common))

    def apply(self, spec: Transformer) -> Transformer:
        return self.placed(spec).apply(spec)

    def moves(self, old: Transformer, new: Transformer) -> Moves:
        return self.placed(old).moves(old, new)


class PromptChange(Swap):
    """Trained vectors before a text's tokens (Lester et al. 2021): ids of their own, which are put before it.

    Attributes:
        name: what the adapter is called.
        tokens: how many there are.
        side: whose text: None is the encoder's where there is one, or else the decoder's.
    """

    name: str = "default"
    tokens: int = 20
    side: Side | None = None

    def check(self) -> None:
        self.require(self.tokens > 0, f"a prompt of {self.tokens} tokens is none; tokens must be at least 1")

    def placed(self, spec: Transformer) -> AddAdapters:
        """Return what it comes to for a model; raises `SpecError` for one that reads no tokens."""
        path, tokens, first = tokens_of(spec, self.side)
        return AddAdapters((Placed(path, Prompt(self.name, 1.0, self.tokens, tokens.width, first)),))

    def apply(self, spec: Transformer) -> Transformer:
        return self.placed(spec).apply(spec)

    def moves(self, old: Transformer, new: Transformer) -> Moves:
        return self.placed(old).moves(old, new)


def attentions_of(spec: Transformer, side: Side | None = None) -> dict[str, Attention]:
    """Return the self-attentions of a side's blocks, by path in the model without adapters.

    Raises:
        SpecError: no such side, or one whose rows are no text's, or whose blocks have none.
    """
    side = side or ("encoder" if spec.decoder is None else "decoder")
    stack, embed = getattr(spec, side), spec.source if side == "encoder" else spec.target
    if not isinstance(stack, Stack) or not isinstance(embed, Embed):
        raise SpecError(
            f"this model has no {side} that reads tokens and is a stack of blocks, for a prefix to stand in"
        )
    records, found = dict(walk(spec)), dict[str, Attention]()
    for plain, path in standing(spec).items():
        record = records[path]
        base = record.base if isinstance(record, Adapted) else record
        if isinstance(base, Attention) and plain.startswith(f"{side}."):
            found[plain] = base
    if not found:
        raise SpecError(f"no block of the {side} has keys and values that a prefix could stand before")
    return found


def tokens_of(spec: Transformer, side: Side | None = None) -> tuple[str, TokenEmbedding, int]:
    """Return where a side's token embedding stands, what it is, and the first id that is free."""
    side = side or ("decoder" if spec.encoder is None else "encoder")
    name = "source" if side == "encoder" else "target"
    embed = getattr(spec, name)
    tokens: Spec | None = embed.tokens if isinstance(embed, Embed) else None
    taken: list[Adapter] = []
    if isinstance(tokens, Adapted):
        taken, tokens = list(tokens.adapters), tokens.base
    if not isinstance(tokens, TokenEmbedding):
        raise SpecError(f"this model has no {side} that reads tokens, for a prompt to stand before")
    ends = [one.first + one.tokens for one in taken if isinstance(one, Prompt)]
    return f"{name}.tokens", tokens, max([tokens.vocabulary, *ends])


def prompt_ids(spec: Transformer, name: str = "default") -> tuple[int, ...]:
    """Return the ids that an adapter wants before every text; none if it is no prompt."""
    return next((one.ids for _, one in walk(spec) if isinstance(one, Prompt) and one.name == name), ())
