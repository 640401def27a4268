"""gMLP (Liu et al. 2021): blocks of one feed-forward network, in which a trained matrix over places lets rows meet.

Without attention and without positions, for comparison with models that have them. It is made from a recipe; there is
no `config.json` of it. The tensors of the package g-mlp-pytorch fit (`names`).
"""

from __future__ import annotations

from typing import Literal

from polyformer import parts
from polyformer.families.blocks import Reads, reader, seen, sides
from polyformer.spec import Record
from polyformer.weights.names import Names, Reshape, Row, rows_below


class GMLP(Record):
    """The sizes of a gMLP that reads `length` tokens at most.

    `reads` "both ways" is the paper's masked language model (section 4); "forwards", which the paper does not have,
    is the same with a lower triangle for each matrix over places: a language model that can be compared with GPT.
    The head is tied to the embedding (`ties` "output"), or has a matrix and a bias of its own.
    """

    vocabulary: int
    length: int
    width: int = 512
    hidden: int = 3072
    layers: int = 48
    reads: Reads = "both ways"
    ties: Literal["none", "output"] = "output"

    def check(self) -> None:
        self.require(min(self.vocabulary, self.length, self.width, self.layers) > 0, "sizes must be at least 1")
        self.require(self.hidden > 0 and self.hidden % 2 == 0, f"hidden must be even, not {self.hidden}")

    def spec(self) -> parts.Transformer:
        """Return the model."""
        embed = parts.Embed(parts.TokenEmbedding(self.vocabulary, self.width))
        stack = parts.Stack((self.block(),) * self.layers, parts.LayerNorm(self.width))
        return reader(embed, stack, self.reads, self.vocabulary, self.ties == "output")

    def block(self) -> parts.Residual:
        """Return x + V s(gelu(U norm(x))), where s is the spatial gating unit (section 2)."""
        steps = (
            parts.Linear(self.width, self.hidden),
            parts.Activate("gelu"),
            parts.SpatialGating.of_width(self.hidden, self.length, seen(self.reads)),
            parts.Linear(self.hidden // 2, self.width),
        )
        return parts.Residual(parts.Chain(steps), pre=parts.LayerNorm(self.width))

    def names(self) -> Names:
        """Return the table of the tensors of g-mlp-pytorch's `gMLP`, without its further kinds (heads, attention)."""
        embed, stack = sides(self.reads)
        ours, disk = f"{stack}.blocks.{{i}}", "layers.{i}.fn"
        inside = {"0": "proj_in.0", "2.norm": "sgu.norm", "3": "proj_out"}
        size = self.length
        return Names(
            [
                Row(f"{embed}.tokens.weight", "to_embed.weight"),
                Row(f"{ours}.pre.{{w}}", f"{disk}.norm.{{w}}"),
                *rows_below(f"{ours}.op.steps", f"{disk}.fn.fn", inside),
                Row(f"{ours}.op.steps.2.weight", f"{disk}.fn.fn.sgu.weight", Reshape((1, size, size), (size, size))),
                Row(f"{ours}.op.steps.2.bias", f"{disk}.fn.fn.sgu.bias", Reshape((1, size), (size,))),
                Row(f"{stack}.norm.{{w}}", "to_logits.0.{w}"),
                Row("head.projection.{w}", "to_logits.1.{w}"),
            ]
        )
