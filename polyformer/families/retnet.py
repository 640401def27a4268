"""RetNet (Sun et al. 2023): a decoder in which retention stands in attention's place. It is made from sizes, as there
is no library whose files would be read."""

from __future__ import annotations

from typing import Literal

from polyformer import parts
from polyformer.families.blocks import block, drop
from polyformer.families.decoder import CAUSAL
from polyformer.spec import Record


class RetNet(Record):
    """The sizes of a RetNet language model; the defaults are those of 1.3 billion parameters (table 2).

    Values and gates are twice as wide as the model, and so is the feed-forward network (`hidden` None), so that a block
    has as many parameters as a Transformer's of that width (section 3.1). `ties` "output" shares one matrix between the
    embedding and the head.
    """

    vocabulary: int
    width: int = 2048
    layers: int = 24
    heads: int = 8
    hidden: int | None = None
    dropout: float = 0.0
    ties: Literal["none", "output"] = "none"

    def check(self) -> None:
        self.require(self.layers > 0, "layers must be at least 1")

    def spec(self) -> parts.Transformer:
        """Return the model; raises `SpecError` for sizes that don't fit."""
        retention = parts.Retention.of_width(self.width, self.heads, CAUSAL)
        hidden = 2 * self.width if self.hidden is None else self.hidden
        feeding = parts.FeedForward.of_widths(self.width, hidden, "gelu", bias=False)
        norm = parts.LayerNorm(self.width)
        one = block(retention, feeding, norm=norm, placement="pre", dropout=self.dropout)
        tie = parts.Tie("head.projection.weight", "target.tokens.weight")
        return parts.Transformer(
            target=parts.Embed(parts.TokenEmbedding(self.vocabulary, self.width), dropout=drop(self.dropout)),
            decoder=parts.Stack((one,) * self.layers, norm),
            head=parts.LMHead.of_width(self.width, self.vocabulary),
            ties=(tie,) if self.ties == "output" else (),
        )
