"""A cache that forgets what lies before a window: the same answers, in bytes that don't grow."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from polyformer.errors import SpecError
from polyformer.parts import (
    Alibi,
    Attention,
    Buckets,
    Capped,
    Causal,
    Embed,
    Kernel,
    LayerNorm,
    Linear,
    LMHead,
    RelativePosition,
    Residual,
    Rotary,
    Rule,
    SameDocument,
    Shaw,
    Sliding,
    Softmax,
    Stack,
    Tiled,
    TokenEmbedding,
    Transformer,
    Window,
)
from polyformer.parts.caches import SlidingCache, cache_for
from polyformer.parts.flow import GrowingCache, StaticCache
from tests.parts.models import build, pad, sentences

HEADS, WIDTH = 3, 12
CAUSAL = Causal() & SameDocument()
POSITIONS: dict[str, RelativePosition | None] = {
    "none": None,
    "rotary": Rotary(WIDTH // HEADS),
    "alibi": Alibi(HEADS),
    "alibi in steps": Alibi(HEADS, precision="bfloat16"),
    "buckets": Buckets(HEADS, 8, 12),
    "shaw": Shaw(WIDTH // HEADS, 3),
}
KERNELS: dict[str, Kernel] = {
    "softmax": Softmax(),
    "sliding": Sliding(2),
    "tiled": Tiled(3, 2),
    "capped": Capped(5.0),
}


def spec_of(rules: tuple[Rule, ...], position: str = "rotary", kernel: str = "softmax") -> Transformer:
    """Return a small language model with one layer to a rule."""
    blocks = []
    for rule in rules:
        attention = Attention.of_width(WIDTH, HEADS, rule)
        own = KERNELS["softmax"] if KERNELS[kernel].unable(rule) else KERNELS[kernel]
        blocks.append(Residual(attention.replace(position=POSITIONS[position], kernel=own), pre=LayerNorm(WIDTH)))
    head = LMHead(Linear(WIDTH, 17))
    return Transformer(target=Embed(TokenEmbedding(17, WIDTH)), decoder=Stack(tuple(blocks)), head=head)


MIXED = (CAUSAL & Window(3), CAUSAL, CAUSAL & Window(2, 3))
CUTS = [(1,) * 30, (12, *(1,) * 18), (3, 14, 1, 1, 11), (30,)]


@torch.no_grad()
def piecewise(model: Any, ids: Tensor, mask: Tensor | None, cuts: tuple[int, ...], cache: Any) -> Tensor:
    found, done = [], 0
    for piece in ids.split(cuts, 1):
        done += piece.shape[1]
        found.append(model(piece, None if mask is None else mask[:, :done], cache=cache).hidden)
    return torch.cat(found, 1)


@pytest.mark.parametrize("cuts", CUTS, ids=["one by one", "prompt first", "in pieces", "whole"])
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("position", POSITIONS)
def test_forgetting_changes_nothing(position: str, kernel: str, cuts: tuple[int, ...]) -> None:
    model = build(spec_of(MIXED, position, kernel))
    ids, _ = pad(sentences((30, 30)))
    cache = SlidingCache(room=30)
    torch.testing.assert_close(piecewise(model, ids, None, cuts, cache), model(ids).hidden)
    assert cache.length == 30


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("position", ["rotary", "alibi", "buckets"])
def test_a_padded_prompt_is_continued(position: str, side: str, kernel: str) -> None:
    """Padding on the right then stands between real tokens, of which a row's last ones may be far behind."""
    model = build(spec_of(MIXED, position, kernel))
    rows, tails = sentences((3, 20)), sentences((14, 14), seed=1)
    ids, mask = pad(rows, side)
    ids = torch.cat((ids, torch.stack(tails)), 1)
    mask = torch.cat((mask, torch.ones(2, 14, dtype=mask.dtype)), 1)
    prompt = ids.shape[1] - 14
    found = piecewise(model, ids, mask, (prompt, 2, *(1,) * 12), SlidingCache(room=40))[:, prompt:]
    wanted = [model(torch.cat((r, t))[None]).hidden[0, len(r) :] for r, t in zip(rows, tails, strict=True)]
    torch.testing.assert_close(found, torch.stack(wanted))


def test_packed_documents() -> None:
    model = build(spec_of(MIXED))
    ids, _ = pad(sentences((30, 30)))
    documents = torch.tensor([[0] * 14 + [1] * 16, [0] * 2 + [1] * 3 + [0] * 25])
    cache, found, done = SlidingCache(room=30), [], 0
    with torch.no_grad():
        for piece in ids.split((11, 4, *(1,) * 15), 1):
            done += piece.shape[1]
            found.append(model(piece, cache=cache, document_ids=documents[:, :done]).hidden)
    torch.testing.assert_close(torch.cat(found, 1), model(ids, document_ids=documents).hidden)


@pytest.mark.parametrize("rows", [[1, 0, 2], [2, 2], [0, 0, 1, 2, 2]])
def test_rows_go_where_they_are_sent(rows: list[int]) -> None:
    model, chosen = build(spec_of(MIXED)), torch.tensor(rows)
    ids, _ = pad(sentences((9,) * 3))
    then, _ = pad(sentences((8,) * len(rows), seed=1))
    cache = SlidingCache(room=40)
    piecewise(model, ids, None, (7, 1, 1), cache)
    cache.reorder(chosen)
    found = piecewise(model, then, None, (1, 3, 1, 1, 1, 1), cache)
    torch.testing.assert_close(found, model(torch.cat((ids[chosen], then), 1)).hidden[:, 9:])


def test_bytes_do_not_grow() -> None:
    model, (row,) = build(spec_of((CAUSAL & Window(16),) * 2)), sentences((300,))
    sizes = {}
    for cuts in ((1,) * 300, (250, *(1,) * 50)):
        cache, sizes[cuts] = SlidingCache(room=1), []
        with torch.no_grad():
            for piece in row.split(cuts):
                model(piece[None], cache=cache)
                sizes[cuts].append(cache.bytes)
    layers, keys_and_values, of_float64 = 2, 2, 8
    held = (16 + 16) * layers * keys_and_values * WIDTH * of_float64
    for each in sizes.values():
        assert max(each) <= held
        assert len(set(each[40:])) == 1


def test_only_windows_forget() -> None:
    model, (row,) = build(spec_of(MIXED)), sentences((30,))
    cache = SlidingCache(room=29)
    with torch.no_grad():
        model(row[None, :29], cache=cache)
        assert cache.forgotten("decoder.1.op") == 0
        with pytest.raises(SpecError, match="the cache has room for 29 tokens, not 30"):
            model(row[None, 29:], cache=cache)
        assert cache.forgotten("decoder.0.op") == 29 - 2


@pytest.mark.parametrize(("rules", "kind"), [((CAUSAL,) * 2, StaticCache), (MIXED, SlidingCache)])
def test_the_cache_for_a_model(rules: tuple[Rule, ...], kind: type) -> None:
    cache = cache_for(spec_of(rules), 7)
    assert type(cache) is kind
    assert cache.room == 7


@given(st.integers(1, 4), st.integers(1, 3), st.lists(st.integers(1, 6), min_size=1, max_size=12))
def test_the_last_keys_are_those_of_a_growing_cache(width: int, step: int, pieces: list[int]) -> None:
    growing, sliding, span = GrowingCache(), SlidingCache(), (width - 1) * step
    for size in pieces:
        new = torch.randn(2, 2, 1, size, 3)
        found, wanted = sliding.extend("0", *new, span), growing.extend("0", *new)
        gone = sliding.forgotten("0")
        assert gone == max(growing.length - span, 0)
        for one, other in zip(found, wanted, strict=True):
            assert one.equal(other[:, :, gone:])
        growing.length += size
        sliding.length += size
