"""Caches: room, order, size. That they change no answer is in test_invariance."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from polyformer.errors import SpecError
from polyformer.parts.flow import GrowingCache, StaticCache
from tests.parts.models import SHAPES, build, decoder, pad, sentences, translator

both = pytest.mark.parametrize("make", [GrowingCache, lambda: StaticCache(room=12)], ids=["growing", "static"])
shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())


@both
@shapes
@pytest.mark.parametrize(
    "rows", [[2, 0, 1], [1, 1, 1], [2, 0], [0, 0, 1, 2, 2], [0, 1, 2]], ids=["order", "one", "fewer", "more", "same"]
)
class TestReorder:
    @pytest.fixture(autouse=True)
    def _without_gradients(self) -> Iterator[None]:
        with torch.no_grad():
            yield

    def test_rows_go_where_they_are_sent(self, make, shape, rows: list[int]) -> None:
        model = build(decoder(shape))
        ids, _ = pad(sentences((5, 5, 5)))
        chosen = torch.tensor(rows)
        then, _ = pad(sentences((4,) * len(rows), seed=1))
        cache = make()
        model(ids, cache=cache)
        cache.reorder(chosen)
        found = torch.cat([model(part, cache=cache).hidden for part in then.split((1, 3), 1)], 1)
        expected = model(torch.cat((ids[chosen], then), 1)).hidden[:, 5:]
        torch.testing.assert_close(found, expected)

    def test_sentences_and_their_hypotheses(self, make, shape, rows: list[int]) -> None:
        """Hypotheses are reordered within sentences, and finished sentences leave."""
        model = build(translator(shape))
        ids, mask = pad(sentences((4, 7, 2)))
        memory = model.encode(ids, mask)
        width = 2
        chosen = torch.tensor(rows)
        hypotheses = (chosen[:, None] * width + torch.arange(width).flip(0)).flatten()
        first, _ = pad(sentences((3,) * 3 * width, seed=1))
        then, _ = pad(sentences((2,) * len(rows) * width, seed=2))
        cache = make()
        model.decode(first, None, memory, cache)
        cache.reorder(hypotheses)
        cache.reorder_memory(chosen)
        kept = memory.select(chosen)
        found = torch.cat([model.decode(part, None, kept, cache) for part in then.split(1, 1)], 1)
        whole = torch.cat((first[hypotheses], then), 1)
        repeated = chosen.repeat_interleave(width)
        expected = model(ids[repeated], mask[repeated], whole).hidden[:, 3:]
        torch.testing.assert_close(found, expected)


@both
def test_a_cache_is_one_models_history(make) -> None:
    model = build(decoder(SHAPES["2017"]))
    ids, _ = pad(sentences((4, 4)))
    cache = make()
    assert cache.bytes == 0
    model(ids, cache=cache)
    assert cache.length == 4
    with pytest.raises(SpecError, match=r"2 rows of 4 cached and 1 new tokens need \[2, 5\]"):
        model(ids[:, :1], torch.ones(2, 1), cache=cache)
    assert cache.length == 4


def test_bytes() -> None:
    model = build(decoder(SHAPES["sandwich-gqa-swiglu"]))
    ids, _ = pad(sentences((4, 4)))
    growing, static = GrowingCache(), StaticCache(room=12)
    for cache in (growing, static):
        model(ids, cache=cache)
    layers, keys_and_values, batch, groups, width, of_float64 = 2, 2, 2, 2, 3, 8
    assert growing.bytes == layers * keys_and_values * batch * groups * 4 * width * of_float64
    assert static.bytes == growing.bytes * 3


def test_a_static_cache_takes_no_more_memory_while_it_fills() -> None:
    model = build(decoder(SHAPES["2017"]))
    ids, _ = pad(sentences((6, 6)))
    cache, sizes = StaticCache(room=6), []
    with torch.no_grad():
        for part in ids.split(2, 1):
            model(part, cache=cache)
            sizes.append(cache.bytes)
        for _ in range(3):
            cache.reorder(torch.tensor([1, 0]))
    assert sizes == [sizes[0]] * 3
    assert cache.bytes <= 2 * sizes[0]


def test_a_static_cache_that_is_full_says_so() -> None:
    model = build(decoder(SHAPES["2017"]))
    ids, _ = pad(sentences((6, 6)))
    cache = StaticCache(room=5)
    with pytest.raises(SpecError, match="the cache has room for 5 tokens, not 6"):
        model(ids, cache=cache)
    model(ids[:, :5], cache=cache)
    with pytest.raises(SpecError, match="the cache has room for 5 tokens, not 6"):
        model(ids[:, 5:], cache=cache)
    assert cache.length == 5


def test_gradients_go_through_a_growing_cache() -> None:
    """Needed where a prefix is trained."""
    model = build(decoder(SHAPES["gpt"]))
    ids, _ = pad(sentences((6, 6)))
    (full,) = torch.autograd.grad(model(ids).hidden[:, 4:].sum(), [model.target.tokens.weight])
    cache = GrowingCache()
    model(ids[:, :4], cache=cache)
    (cached,) = torch.autograd.grad(model(ids[:, 4:], cache=cache).hidden.sum(), [model.target.tokens.weight])
    torch.testing.assert_close(cached, full)


steps = st.lists(st.tuples(st.integers(1, 3), st.lists(st.integers(0, 9), min_size=1, max_size=6)), max_size=6)


@given(steps)
def test_static_and_growing_hold_the_same(history: list[tuple[int, list[int]]]) -> None:
    growing, static, batch = GrowingCache(), StaticCache(room=18), 3
    for length, chosen in history:
        new = torch.randn(2, batch, 2, length, 4)
        for one, other in zip(growing.extend("0", *new), static.extend("0", *new), strict=True):
            assert torch.equal(one, other)
        growing.length += length
        static.length += length
        rows = torch.tensor(chosen) % batch
        growing.reorder(rows)
        static.reorder(rows)
        batch = len(rows)
