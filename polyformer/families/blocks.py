"""What several families have in common: sublayers in their residual connections, and BART's names for them."""

from __future__ import annotations

from typing import Literal

from polyformer.parts import (
    Activate,
    Causal,
    Chain,
    Dropout,
    Embed,
    LastOf,
    Linear,
    LMHead,
    Norm,
    Residual,
    Rule,
    SameDocument,
    Stack,
    Tie,
    Transformer,
)
from polyformer.spec import Spec
from polyformer.weights.names import Row, rows_below

Placement = Literal["post", "pre", "sandwich", "output"]
Reads = Literal["both ways", "forwards"]
"""Whether each row of a text sees all of it, or what stands before it."""


def drop(rate: float) -> Dropout | None:
    """Return a dropout part, or nothing where nothing is dropped."""
    return Dropout(rate) if rate else None


def block(*sublayers: Spec, norm: Norm, placement: Placement = "post", dropout: float = 0.0) -> Chain:
    """Return a block: each sublayer in a residual connection, with its norm after the sum (the 2017 paper), before
    the sublayer, on both sides of it, or on its output only (OLMo 2); dropout stands on the sublayer's output."""
    dropped = drop(dropout)
    both = norm if dropped is None else Chain((norm, dropped))
    if placement == "post":
        steps = [Residual(op, post=dropped, after=norm) for op in sublayers]
    elif placement == "pre":
        steps = [Residual(op, pre=norm, post=dropped) for op in sublayers]
    elif placement == "sandwich":
        steps = [Residual(op, pre=norm, post=both) for op in sublayers]
    else:
        steps = [Residual(op, post=both) for op in sublayers]
    return Chain(tuple(steps))


def seen(reads: Reads) -> Rule:
    """Return what rows see of their own document."""
    return Causal() & SameDocument() if reads == "forwards" else SameDocument()


def reader(embed: Embed, stack: Stack, reads: Reads, vocabulary: int, tied: bool) -> Transformer:
    """Return a model of one stack that scores words: an encoder for masked ones, or a decoder for the next ones.

    Its head is tied to the embedding, or is a matrix of its own, with a bias.
    """
    forwards = reads == "forwards"
    width = embed.tokens.width  # type: ignore[attr-defined]
    tie = Tie("head.projection.weight", f"{'target' if forwards else 'source'}.tokens.weight")
    head, ties = LMHead.of_width(width, vocabulary, bias=not tied), (tie,) if tied else ()
    if forwards:
        return Transformer(target=embed, decoder=stack, head=head, ties=ties)
    return Transformer(source=embed, encoder=stack, head=head, ties=ties)


def sides(reads: Reads) -> tuple[str, str]:
    """Return where the embedding and the stack of such a model stand."""
    return ("target", "decoder") if reads == "forwards" else ("source", "encoder")


def judge(width: int, labels: int, end: int, dropout: float) -> Chain:
    """Return BART's and T5's head over the row of the token `end`, which has seen the whole text."""
    dense, out = Linear(width, width), Linear(width, labels)
    return Chain((LastOf(end), Dropout(dropout), dense, Activate("tanh"), Dropout(dropout), out))


def bart_rows(placement: Placement = "post", below: str = "model.") -> list[Row]:
    """Return the rows of encoder and decoder blocks as BART and its relatives (mBART, Marian, M2M100, Pegasus) name
    them; such blocks are made by `block(attention, [cross-attention,] feed-forward)`, and `below` stands before each
    name on disk."""
    slot = "after" if placement == "post" else "pre"
    attentions = {"encoder": ("self_attn",), "decoder": ("self_attn", "encoder_attn")}
    rows = []
    for stack, names in attentions.items():
        last = len(names)
        modules = {f"{last}.op.up": "fc1", f"{last}.op.down": "fc2", f"{last}.{slot}": "final_layer_norm"}
        for step, name in enumerate(names):
            projections = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "out_proj"}
            modules |= {f"{step}.op.{ours}": f"{name}.{theirs}" for ours, theirs in projections.items()}
            modules[f"{step}.{slot}"] = f"{name}_layer_norm"
        rows += rows_below(f"{stack}.blocks.{{i}}.steps", f"{below}{stack}.layers.{{i}}", modules)
    return rows
