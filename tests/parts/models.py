"""Small models of every kind, for the tests that hold for all of them."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from polyformer.parts import (
    Attention,
    Causal,
    Chain,
    Concatenate,
    CrossAttention,
    Embed,
    FeedForward,
    Gate,
    Heads,
    LayerNorm,
    Learned,
    Linear,
    LMHead,
    Residual,
    RMSNorm,
    Rule,
    SameDocument,
    Sinusoidal,
    Stack,
    Tie,
    TokenEmbedding,
    Transformer,
)
from polyformer.parts.model import TransformerPart
from polyformer.parts.rules import Everyone
from polyformer.spec import Record, Spec, rewrite

WIDTH, VOCABULARY, LAYERS = 12, 17, 2

EMBEDDINGS: dict[str, Embed] = {
    "sinusoidal": Embed(TokenEmbedding(VOCABULARY, WIDTH), Sinusoidal(WIDTH), scale=WIDTH**0.5),
    "learned": Embed(TokenEmbedding(VOCABULARY, WIDTH), Learned(WIDTH, 40), norm=LayerNorm(WIDTH)),
    "concatenated": Embed(TokenEmbedding(VOCABULARY, 7), Sinusoidal(5, layout="halves"), Concatenate()),
    "gated": Embed(TokenEmbedding(VOCABULARY, WIDTH), Sinusoidal(WIDTH), Gate.of_width(WIDTH)),
    "without": Embed(TokenEmbedding(VOCABULARY, WIDTH)),
}


def post(op: Spec) -> Residual:
    """The 2017 paper's placement."""
    return Residual(op, after=LayerNorm(WIDTH))


def pre(op: Spec) -> Residual:
    """GPT-2's placement."""
    return Residual(op, pre=LayerNorm(WIDTH))


def sandwich(op: Spec) -> Residual:
    """A norm on either side of the sublayer."""
    return Residual(op, pre=RMSNorm(WIDTH), post=RMSNorm(WIDTH))


PLACEMENTS = {"post": post, "pre": pre, "sandwich": sandwich}


def attention(heads: int, groups: int, see: Rule) -> Attention:
    """Self-attention with any number of key/value heads."""
    own, shared = Linear(WIDTH, WIDTH), Linear(WIDTH, WIDTH // heads * groups)
    return Attention(own, shared, shared, own, Heads(heads, groups, WIDTH // heads), see)


def cross(heads: int, groups: int) -> CrossAttention:
    """Cross-attention with any number of key/value heads."""
    one = attention(heads, groups, Everyone())
    return CrossAttention(one.q, one.k, one.v, one.o, one.heads)


class Shape(Record):
    """What tells one small model from another."""

    positions: str = "sinusoidal"
    placement: str = "post"
    heads: int = 4
    groups: int = 4
    gated: bool = False

    def feeding(self) -> FeedForward:
        """The feed-forward network."""
        return FeedForward.gated(WIDTH, 20) if self.gated else FeedForward.of_widths(WIDTH, 20)

    def stack(self, see: Rule, looks: bool = False) -> Stack:
        """A stack of blocks under one rule, with cross-attention if `looks`."""
        place = PLACEMENTS[self.placement]
        steps = [place(attention(self.heads, self.groups, see)), place(self.feeding())]
        if looks:
            steps.insert(1, place(cross(self.heads, self.groups)))
        return Stack((Chain(tuple(steps)),) * LAYERS, None if self.placement == "post" else LayerNorm(WIDTH))


SHAPES = {
    "2017": Shape(),
    "gpt": Shape("learned", "pre"),
    "sandwich-gqa-swiglu": Shape("sinusoidal", "sandwich", 4, 2, True),
    "mqa-concatenated": Shape("concatenated", "pre", 3, 1),
    "gated-positions": Shape("gated", "post", 2, 2, True),
    "no-positions": Shape("without", "pre"),
}


def decoder(shape: Shape, see: Rule | None = None) -> Transformer:
    """A language model; its documents don't see each other."""
    see = Causal() & SameDocument() if see is None else see
    embed = EMBEDDINGS[shape.positions]
    return Transformer(target=embed, decoder=shape.stack(see), head=LMHead.of_width(WIDTH, VOCABULARY, bias=True))


def encoder(shape: Shape) -> Transformer:
    """A reader without a head."""
    return Transformer(source=EMBEDDINGS[shape.positions], encoder=shape.stack(SameDocument()))


def translator(shape: Shape) -> Transformer:
    """An encoder–decoder model with one tied matrix."""
    embed = EMBEDDINGS[shape.positions]
    return Transformer(
        source=embed,
        encoder=shape.stack(Everyone()),
        target=embed,
        decoder=shape.stack(Causal(), looks=True),
        head=LMHead.of_width(WIDTH, VOCABULARY),
        ties=(Tie("target.tokens.weight", "source.tokens.weight"),),
    )


def build(spec: Transformer, dtype: torch.dtype = torch.float64) -> TransformerPart:
    """Build with weights drawn wide enough that every position and token matters, biases and norms too."""
    model = spec.build(dtype=dtype).eval()
    assert isinstance(model, TransformerPart)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            drawn = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
            gain = name.endswith("weight") and weight.ndim == 1
            weight.copy_(1 + 0.2 * drawn if gain else 0.5 * drawn)
    return model


def without(spec: Transformer, kind: type[Record]) -> Transformer:
    """Leave out every optional record of a type."""

    def change(path: str, record: Record) -> Record:
        names = [n for n in ("pre", "post", "after", "norm") if isinstance(getattr(record, n, None), kind)]
        return record.replace(**dict.fromkeys(names)) if names else record

    return rewrite(spec, change)


def sentences(lengths: tuple[int, ...], seed: int = 0) -> list[Tensor]:
    """Draw rows of token ids."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(VOCABULARY, (n,), generator=generator) for n in lengths]


def pad(rows: list[Tensor], side: str = "right", width: int | None = None) -> tuple[Tensor, Tensor]:
    """Lay rows into one batch with token 3 as padding: ids [B, T] and mask [B, T]."""
    width = max(map(len, rows)) if width is None else width
    ids = torch.full((len(rows), width), 3)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        place = slice(0, len(row)) if side == "right" else slice(width - len(row), width)
        ids[i, place], mask[i, place] = row, 1
    return ids, mask


def real(rows: Tensor, mask: Tensor) -> Iterator[Tensor]:
    """Give each sentence's real rows of [B, T, ...]."""
    for row, valid in zip(rows, mask.bool(), strict=True):
        yield row[valid]


def gradients(model: TransformerPart, loss: Tensor) -> dict[str, Tensor]:
    """Return the gradient of each parameter, zeros where there is none."""
    model.zero_grad()
    loss.backward()
    return {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Compare tensors by name."""
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], msg=lambda text, name=name: f"{name}: {text}")
