"""A small language model of one's own sizes: a decoder that reads forwards, or an encoder that reads both ways."""

from __future__ import annotations

import math
from typing import Literal

from polyformer import parts
from polyformer.errors import SpecError
from polyformer.families.blocks import block, drop
from polyformer.families.mixers import Sizes, mixer
from polyformer.families.transformer import FeedForwardChoice, NormChoice
from polyformer.spec import Record, Spec


class LanguageModel(Record):
    """The sizes and choices of a language model.

    Rows meet by `attention`: "softmax", "tiled", "window", "local", "performer", "linformer", "linear", "retention",
    "lsh", "gmlp", "none", any other kernel by its name, or any of these written out,
    `{type = "Performer", features = 128}`. Sizes that a table leaves open are filled in: the width of a head, the
    longest sequence. "window" sees a quarter of `length`; another width is `{type = "Window", width = 64}`.

    "rotary" and "alibi" positions stand in attention, "learned" and "sinusoidal" ones are added to the tokens. Of what
    stands in attention's place, retention and gMLP's gate have their own; "lsh" knows order by its rule alone, and
    wants positions that are added.

    `vocabulary`, `length` (the longest sequence) and `reads` may be left out where a recipe will tell them; `spec`
    needs the vocabulary.
    """

    vocabulary: int | None = None
    length: int | None = None
    reads: Literal["forwards", "both ways"] | None = None
    width: int = 256
    depth: int = 4
    heads: int = 4
    attention: str | parts.Rule | Spec = "softmax"
    feedforward: FeedForwardChoice = FeedForwardChoice(1024, "gelu")
    norm: NormChoice = NormChoice(placement="pre")
    positions: Literal["rotary", "alibi", "learned", "sinusoidal", "none"] = "rotary"
    dropout: float = 0.0
    ties: Literal["none", "output"] = "output"

    def check(self) -> None:
        self.require(min(self.width, self.depth, self.heads) > 0, "width, depth and heads must be at least 1")
        self.require(self.vocabulary is None or self.vocabulary > 0, "vocabulary must be at least 1")
        self.require(self.length is None or self.length > 0, "length must be at least 1")
        ahead = "BatchNorm takes the mean of all places, so a model that reads forwards would see what comes"
        self.require(self.norm.kind != "batch" or self.reads == "both ways", ahead)

    def spec(self) -> parts.Transformer:
        """Return the model; raises `SpecError` for sizes that don't fit, or while the vocabulary is unknown."""
        if self.vocabulary is None:
            raise SpecError("LanguageModel: the vocabulary must be known to make a model")
        embed, stack = self._embed(self.vocabulary), self._stack()
        head = parts.LMHead.of_width(self.width, self.vocabulary)
        side = "source" if self.reads == "both ways" else "target"
        ties = (parts.Tie("head.projection.weight", f"{side}.tokens.weight"),) if self.ties == "output" else ()
        if self.reads == "both ways":
            return parts.Transformer(source=embed, encoder=stack, head=head, ties=ties)
        return parts.Transformer(target=embed, decoder=stack, head=head, ties=ties)

    def _embed(self, vocabulary: int) -> parts.Embed:
        tokens = parts.TokenEmbedding(vocabulary, self.width)
        if self.positions == "sinusoidal":
            positions: parts.Position = parts.Sinusoidal(self.width, self.length)
            return parts.Embed(tokens, positions, scale=math.sqrt(self.width), dropout=drop(self.dropout))
        if self.positions == "learned":
            self.require(self.length is not None, "learned positions need to know the longest sequence; set length")
            return parts.Embed(tokens, parts.Learned(self.width, self.length), dropout=drop(self.dropout))
        return parts.Embed(tokens, dropout=drop(self.dropout))

    def _stack(self) -> parts.Stack:
        see: parts.Rule = parts.SameDocument()
        see = see if self.reads == "both ways" else parts.Causal() & see
        meeting = mixer(self.attention, Sizes(self.width, self.heads, self.length), see)
        if isinstance(meeting, parts.Attention):
            meeting = meeting.replace(position=self._position(meeting.heads))
        steps = (
            (self.feedforward.spec(self.width),)
            if meeting is None
            else (
                meeting,
                self.feedforward.spec(self.width),
            )
        )
        norm = self.norm.spec(self.width)
        one = block(*steps, norm=norm, placement=self.norm.placement, dropout=self.dropout)
        return parts.Stack((one,) * self.depth, self.norm.last(self.width))

    def _position(self, heads: parts.Heads) -> parts.RelativePosition | None:
        if self.positions == "rotary":
            return parts.Rotary(heads.width)
        return parts.Alibi(heads.count) if self.positions == "alibi" else None
