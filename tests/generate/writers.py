"""Small random models of every kind that writes: what they attend with, how they know order, one with an encoder."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from polyformer.families.retnet import RetNet
from polyformer.generate import Request, Sampling
from polyformer.parts import (
    Alibi,
    Attention,
    Causal,
    Chain,
    Chunks,
    Embed,
    FeedForward,
    Hashes,
    Hashing,
    Heads,
    LayerNorm,
    Learned,
    LMHead,
    Residual,
    Rotary,
    SameDocument,
    Stack,
    TokenEmbedding,
    Transformer,
    Window,
)
from polyformer.parts.model import TransformerPart
from tests.generate.models import BOS, tiny_spec

VOCABULARY = 31


def decoder_spec(kind: str) -> Transformer:
    """Return a decoder of two blocks."""
    rule = Causal() & Window(5) if kind == "windowed" else Causal()
    attention = Attention.of_width(16, 2, rule & SameDocument())
    positions = {"dense": Rotary(8), "windowed": Rotary(8), "alibi": Alibi(2)}.get(kind)
    attention = attention.replace(position=positions)
    if kind == "hashing":
        rule = Causal() & SameDocument()
        attention = Hashing.of_width(16, Heads(2, 2, 8), Chunks(2), rule, Hashes(buckets=(2,), seed=1))
    norm = LayerNorm(16)
    block = Chain((Residual(attention, pre=norm), Residual(FeedForward.of_widths(16, 32), pre=norm)))
    embed = Embed(TokenEmbedding(VOCABULARY, 16), Learned(16, 64) if kind == "learned" else None)
    return Transformer(target=embed, decoder=Stack((block, block), norm), head=LMHead.of_width(16, VOCABULARY))


def spec_of(kind: str) -> Transformer:
    """Return the spec of a kind of model."""
    if kind == "recurrent":
        return RetNet(VOCABULARY, 16, 2, 2).spec()
    if kind == "encoder-decoder":
        return tiny_spec(VOCABULARY)
    return decoder_spec(kind)


KINDS = ("dense", "hashing", "windowed", "recurrent", "encoder-decoder", "alibi", "learned")


def writer(kind: str = "dense") -> TransformerPart:
    """Build a model whose answers differ much, in double precision, so that no rounding decides between tokens."""
    torch.manual_seed(3)
    model = spec_of(kind).build(dtype=torch.float64)
    assert isinstance(model, TransformerPart)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return model.eval()


def ids(count: int, seed: int) -> list[int]:
    """Return random tokens."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(4, VOCABULARY, (count,), generator=generator).tolist()


def requests(kind: str, count: int, seed: int = 0) -> list[Request]:
    """Return requests of mixed lengths: greedy and drawn ones, with and without cuts, some with a shared beginning."""
    shared = ids(20, 99)
    found = []
    for i in range(count):
        length = 1 + (7 * i + seed) % 33
        prompt = [*shared[: 20 if i % 5 == 0 and length < 25 else 0], *ids(length, seed + i)]
        settings = Sampling(limit=1 + (5 * i) % 13)
        if i % 3:
            settings = settings.replace(temperature=0.5 + i % 4 / 2, top_k=7 if i % 2 else None, seed=i)
        ends: Sequence[int] = (3,) if i % 4 else ()
        if kind == "encoder-decoder":
            found.append(Request([BOS], settings, ends, source=prompt, user=str(i % 3)))
        else:
            found.append(Request(prompt, settings, ends, user=str(i % 3)))
    return found
