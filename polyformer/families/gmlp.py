"""gMLP (Liu et al. 2021): blocks of one feed-forward network, in which a trained matrix over places lets rows meet.

Without attention and without positions, for comparison with models that have them. It is made from a recipe; there is
no `config.json` of it.
"""

from __future__ import annotations

from typing import Literal

from polyformer import parts
from polyformer.spec import Record


class GMLP(Record):
    """The sizes of a gMLP that reads `length` tokens at most.

    `reads` "both ways" is the paper's masked language model (section 4); "forwards", which the paper does not have,
    is the same with a lower triangle for each matrix over places: a language model that can be compared with GPT.
    """

    vocabulary: int
    length: int
    width: int = 512
    hidden: int = 3072
    layers: int = 48
    reads: Literal["both ways", "forwards"] = "both ways"

    def check(self) -> None:
        self.require(min(self.vocabulary, self.length, self.width, self.layers) > 0, "sizes must be at least 1")
        self.require(self.hidden > 0 and self.hidden % 2 == 0, f"hidden must be even, not {self.hidden}")

    def spec(self) -> parts.Transformer:
        """Return the model, whose head is tied to its embedding."""
        embed = parts.Embed(parts.TokenEmbedding(self.vocabulary, self.width))
        stack = parts.Stack((self.block(),) * self.layers, parts.LayerNorm(self.width))
        head = parts.LMHead.of_width(self.width, self.vocabulary)
        if self.reads == "forwards":
            tie = parts.Tie("head.projection.weight", "target.tokens.weight")
            return parts.Transformer(target=embed, decoder=stack, head=head, ties=(tie,))
        tie = parts.Tie("head.projection.weight", "source.tokens.weight")
        return parts.Transformer(source=embed, encoder=stack, head=head, ties=(tie,))

    def block(self) -> parts.Residual:
        """Return x + V s(gelu(U norm(x))), where s is the spatial gating unit (section 2)."""
        apart = parts.SameDocument()
        see = parts.Causal() & apart if self.reads == "forwards" else apart
        steps = (
            parts.Linear(self.width, self.hidden),
            parts.Activate("gelu"),
            parts.SpatialGating.of_width(self.hidden, self.length, see),
            parts.Linear(self.hidden // 2, self.width),
        )
        return parts.Residual(parts.Chain(steps), pre=parts.LayerNorm(self.width))
