"""Linformer (Wang et al. 2020): an encoder whose attention sees a fixed number of mixtures of its keys.

It is made from sizes; there is no `config.json` of it. The tensors of the package linformer fit (`names`).
"""

from __future__ import annotations

from typing import Literal

from polyformer import parts
from polyformer.families.blocks import block, drop, reader
from polyformer.spec import Record
from polyformer.weights.names import Names, Row, Transpose, rows_below


class LinformerLM(Record):
    """The sizes of a Linformer that reads `length` tokens at most, both ways, for masked words.

    `sharing` says what has a projection over places of its own (section 4): in each layer keys and values ("heads"),
    each layer ("key-value"), or nothing ("layers": one for all). "keys as values" goes further than the paper, as the
    package may: keys also serve as values. `groups` are heads of keys and values (None: as many as of queries).
    Norms stand in front, with none behind the last layer, and the head has a bias, as in the package.
    """

    vocabulary: int
    length: int
    width: int = 512
    layers: int = 6
    heads: int = 8
    groups: int | None = None
    rank: int = 256
    sharing: Literal["heads", "key-value", "layers", "keys as values"] = "heads"
    hidden: int | None = None
    dropout: float = 0.0

    def check(self) -> None:
        self.require(min(self.vocabulary, self.layers) > 0, "sizes must be at least 1")

    def spec(self) -> parts.Transformer:
        """Return the model; raises `SpecError` for sizes that don't fit."""
        hidden = 4 * self.width if self.hidden is None else self.hidden
        norm, feeding = parts.LayerNorm(self.width), parts.FeedForward.of_widths(self.width, hidden, "gelu")
        one = block(self._attention(), feeding, norm=norm, placement="pre", dropout=self.dropout)
        tokens, places = parts.TokenEmbedding(self.vocabulary, self.width), parts.Learned(self.width, self.length)
        embed = parts.Embed(tokens, places, dropout=drop(self.dropout))
        model = reader(embed, parts.Stack((one,) * self.layers), "both ways", self.vocabulary, tied=False)
        at = "encoder.blocks.{}.steps.0.op.{}"
        layers = range(self.layers)
        ties: list[parts.Tie] = []
        if self.sharing == "layers":
            ties = [parts.Tie(at.format(i, "kernel.keys"), at.format(0, "kernel.keys")) for i in layers[1:]]
        elif self.sharing == "keys as values":
            ties = [parts.Tie(at.format(i, "v.weight"), at.format(i, "k.weight")) for i in layers]
        return model.replace(ties=tuple(ties))

    def _attention(self) -> parts.Attention:
        heads = parts.Heads.of_width(self.width, self.heads, self.groups)
        kernel = parts.Linformer(self.length, self.rank, "separate" if self.sharing == "heads" else "shared")
        made = parts.Attention.of_heads(self.width, heads, parts.SameDocument(), out_bias=True)
        return made.replace(kernel=kernel.replace(dropout=self.dropout))

    def names(self) -> Names:
        """Return the table of the tensors of the package's `LinformerLM`."""
        ours, disk = "encoder.blocks.{i}.steps", "linformer.net.layers.{i}"
        attention = {"q": "to_q", "k": "to_k", "v": "to_v", "o": "to_out"}
        return Names(
            [
                Row("source.tokens.weight", "token_emb.weight"),
                Row("source.positions.weight", "pos_emb.weight"),
                Row(f"{ours}.{{j}}.pre.{{w}}", f"{disk}.{{j}}.norm.{{w}}"),
                *rows_below(f"{ours}.0.op", f"{disk}.0.fn", attention),
                Row(f"{ours}.0.op.kernel.keys", f"{disk}.0.fn.proj_k", Transpose()),
                Row(f"{ours}.0.op.kernel.values", f"{disk}.0.fn.proj_v", Transpose()),
                *rows_below(f"{ours}.1.op", f"{disk}.1.fn", {"up": "w1", "down": "w2"}),
                Row("head.projection.{w}", "to_logits.{w}"),
            ]
        )
