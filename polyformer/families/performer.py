"""Performer (Choromanski et al. 2021): a language model whose attention is estimated by random features.

It is made from sizes; there is no `config.json` of it. The tensors of the package performer-pytorch fit (`names`).
"""

from __future__ import annotations

import math
from typing import Literal

from polyformer import parts
from polyformer.families.blocks import Reads, block, drop, reader, seen, sides
from polyformer.spec import Record
from polyformer.weights.names import Check, Names, Row, Split, below, rows_below


class PerformerLM(Record):
    """The sizes of a Performer that reads a text both ways, for masked words, or forwards, for the next ones.

    `features` None are E · ln E for heads E wide. `function` "exp" estimates softmax attention, the others are
    generalised attention. New features are drawn every `redraw_every` steps of training. Positions are rotary, beside
    sinusoids that are added to the embeddings, or "learned", of which there are `length`. The head is tied to the
    embedding (`ties` "output"), or has a matrix and a bias of its own.
    """

    vocabulary: int
    length: int = 2048
    width: int = 512
    layers: int = 6
    heads: int = 8
    head_width: int = 64
    features: int | None = None
    function: Literal["exp", "relu", "sigmoid", "abs"] = "exp"
    redraw_every: int = 1000
    hidden: int | None = None
    feedforward: Literal["gelu", "geglu"] = "gelu"
    reads: Reads = "forwards"
    positions: Literal["rotary", "learned"] = "rotary"
    dropout: float = 0.0
    ties: Literal["none", "output"] = "none"

    def check(self) -> None:
        self.require(min(self.vocabulary, self.length, self.layers) > 0, "sizes must be at least 1")

    def spec(self) -> parts.Transformer:
        """Return the model; raises `SpecError` for sizes that don't fit."""
        rotary = self.positions == "rotary"
        added = parts.Sinusoidal(self.width, layout="halves") if rotary else parts.Learned(self.width, self.length)
        tokens = parts.TokenEmbedding(self.vocabulary, self.width)
        norm = parts.LayerNorm(self.width)
        one = block(self._attention(), self._feed_forward(), norm=norm, placement="pre", dropout=self.dropout)
        embed, stack = parts.Embed(tokens, added, dropout=drop(self.dropout)), parts.Stack((one,) * self.layers, norm)
        return reader(embed, stack, self.reads, self.vocabulary, self.ties == "output")

    def _attention(self) -> parts.Attention:
        heads, wide = parts.Heads(self.heads, self.heads, self.head_width), self.head_width
        features = max(int(wide * math.log(wide)), 1) if self.features is None else self.features
        return parts.Attention.of_heads(self.width, heads, seen(self.reads)).replace(
            kernel=parts.Performer(wide, features, self.function, redraw_every=self.redraw_every),
            position=parts.Rotary(wide, layout="interleaved") if self.positions == "rotary" else None,
        )

    def _feed_forward(self) -> parts.FeedForward:
        hidden = 4 * self.width if self.hidden is None else self.hidden
        if self.feedforward == "geglu":
            return parts.FeedForward.gated(self.width, hidden, "gelu", bias=True)
        return parts.FeedForward.of_widths(self.width, hidden, "gelu")

    def names(self) -> Names:
        """Return the table of the tensors of performer-pytorch's `PerformerLM`, without its further kinds of norms."""
        embed, stack = sides(self.reads)
        at, attention = f"{stack}.blocks.{{i}}.steps", {"q": "to_q", "k": "to_k", "v": "to_v", "o": "to_out"}
        layers = [
            Row(f"{at}.{{j}}.pre.{{w}}", "layers.{i}.{j}.norm.{w}"),
            *rows_below(f"{at}.0.op", "layers.{i}.0.fn", attention),
            Row(f"{at}.0.op.kernel.projection", "layers.{i}.0.fn.fast_attention.projection_matrix"),
            *rows_below(f"{at}.1.op", "layers.{i}.1.fn.fn", {"down": "w2"}),
        ]
        both = [f"{at}.1.op.{one}.{{w}}" for one in ("gate", "up")]
        gated = self.feedforward == "geglu"
        layers.append(Row(both if gated else both[1], "layers.{i}.1.fn.fn.w1.{w}", *[Split(2)] * gated))
        rows = [
            Row(f"{embed}.tokens.weight", "token_emb.weight"),
            Row(f"{embed}.positions.weight", "pos_emb.emb.weight"),
            *below("performer.net.", layers),
            *below("performer.proj_updater.instance.", layers),  # where the package lists all layers once more
            Row(f"{stack}.norm.{{w}}", "norm.{w}"),
            Row("head.projection.{w}", "to_out.{w}"),
        ]
        counter: dict[str, Check] = {"performer.proj_updater.calls_since_last_redraw": lambda calls: True}
        sinusoids: dict[str, Check] = {
            f"{one}.emb": lambda table: table.ndim == 2 for one in ("pos_emb", "layer_pos_emb")
        }
        return Names(rows, counter | sinusoids)
