"""Rules and score biases asked for by place: what is said of some queries and keys is what is said of all of them."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from polyformer.errors import SpecError
from polyformer.parts import (
    Alibi,
    Buckets,
    Causal,
    GridBias,
    RelativePosition,
    Rule,
    SameDocument,
    Shaw,
    TransformerXL,
    Window,
)
from polyformer.parts.bias import Bias
from polyformer.parts.flow import GrowingCache, start_flow
from polyformer.parts.rules import Everyone
from polyformer.parts.view import View

HEADS, E = 3, 4
BIASES: dict[str, RelativePosition] = {
    "alibi": Alibi(HEADS),
    "alibi in steps": Alibi(HEADS, precision="bfloat16"),
    "buckets": Buckets(HEADS, 8, 12),
    "shaw": Shaw(E, 3),
    "transformer-xl": TransformerXL.of_width(HEADS * E, HEADS),
    "grid": GridBias(HEADS, 2, 4),
}


@st.composite
def rules(draw: st.DrawFn) -> Rule:
    """Draw a combination of rules."""
    window = st.builds(Window, st.integers(1, 5), st.integers(1, 3))
    parts = draw(st.lists(st.sampled_from([Causal(), SameDocument()]) | window, max_size=3))
    rule: Rule = Everyone()
    for one in parts:
        rule = rule & one
    return rule


@st.composite
def views(draw: st.DrawFn) -> View:
    """Draw a batch of three: padding anywhere, packed documents, earlier tokens in a cache."""
    keys = draw(st.integers(1, 9))
    queries = draw(st.integers(1, keys))

    def table(highest: int) -> st.SearchStrategy[Tensor]:
        return st.lists(st.lists(st.integers(0, highest), min_size=keys, max_size=keys), min_size=3, max_size=3).map(
            torch.tensor
        )

    valid, documents = draw(st.none() | table(1)), draw(st.none() | table(2))
    return start_flow(torch.zeros(3, queries), valid, documents, GrowingCache(length=keys - queries)).view


def plainly(rule: Rule, view: View) -> Tensor:
    """Return what is allowed, [3, S, K], padding left out."""
    allowed = rule.allowed(view)
    return torch.ones(3, view.queries, view.keys, dtype=torch.bool) if allowed is None else allowed.expand(3, -1, -1)


@given(rules(), views(), st.data())
def test_a_rule_says_the_same_of_any_places(rule: Rule, view: View, data: st.DataObject) -> None:
    past, dense = view.keys - view.queries, plainly(rule, view)
    if view.valid is not None:
        dense = dense & view.valid[:, None]
    for shape in ((), (1,), (3,), (1, 1), (3, 1), (3, 2), (3, 2, 4)):
        queries = torch.randint(past, view.keys, (*shape, 5, 1))
        keys = torch.randint(0, view.keys, (*shape, 1, 6))
        found = view.among(rule, queries, keys)
        full = (3, *shape[1:2], *[1] * (len(shape) < 2), *shape[2:], 5, 6)
        batch = torch.arange(3).view(-1, *[1] * (len(full) - 1))
        asking, asked = ((one[:, None] if one.ndim == 3 else one) for one in (queries, keys))
        wanted = dense[batch, (asking - past).expand(full), asked.expand(full)]
        assert (torch.ones(full) if found is None else found.expand(full)).bool().equal(wanted)


@given(rules(), views(), st.data())
def test_what_is_skipped_and_what_is_opened(rule: Rule, view: View, data: st.DataObject) -> None:
    past, dense = view.keys - view.queries, plainly(rule, view)
    queries, keys = (
        range(*sorted(data.draw(st.tuples(st.integers(low, view.keys), st.integers(low, view.keys)))))
        for low in (past, 0)
    )
    rows = dense[:, queries.start - past : queries.stop - past]
    reach = rule.reach(view, queries)
    assert not rows[..., : reach.start].any()
    assert not rows[..., reach.stop :].any()
    if rule.opens(view, queries, keys):
        assert rows[..., keys.start : keys.stop].all()
    found, wanted = view.block(rule, queries, keys), rows[..., keys.start : keys.stop]
    wanted = wanted if view.valid is None else wanted & view.valid[:, None, keys.start : keys.stop]
    shape = (3, 1, len(queries), len(keys))
    assert (torch.ones(shape) if found is None else found.expand(shape)).bool().equal(wanted[:, None])


@given(rules(), st.integers(1, 9))
def test_the_simplest_rule_means_the_same(rule: Rule, keys: int) -> None:
    for queries in {1, keys}:
        view = start_flow(torch.zeros(3, queries), None, None, GrowingCache(length=keys - queries)).view
        assert plainly(rule.here(view), view).equal(plainly(rule, view))


def test_a_window_looks_at_every_second_key() -> None:
    view = start_flow(torch.zeros(1, 7)).view
    allowed = (Window(2, 2) & Causal()).allowed(view)
    assert allowed is not None
    assert [row.nonzero().flatten().tolist() for row in allowed[0]] == [[0], [1], *([i - 2, i] for i in range(2, 7))]


def test_refused() -> None:
    with pytest.raises(SpecError, match="width must be at least 1"):
        Window(0)
    with pytest.raises(SpecError, match="step must be at least 1"):
        Window(3, 0)


def bias_of(name: str, view_of: str) -> tuple[Bias, Tensor, Any]:
    torch.manual_seed(0)
    part = cast(Any, BIASES[name].build(dtype=torch.float64))
    for weight in part.parameters():
        torch.nn.init.normal_(weight)
    valid = torch.tensor([[1, 1, 0, 0, 1, 1, 1], [0, 1, 1, 1, 1, 1, 1]]) if view_of == "gaps" else None
    flow = start_flow(torch.zeros(2, 5), valid, None, GrowingCache(length=2))
    q = torch.randn(2, HEADS, 5, E, dtype=torch.float64, requires_grad=True)
    return part.bias(q, flow), q, part


@pytest.mark.parametrize("view_of", ["plain", "gaps"])
@pytest.mark.parametrize("name", BIASES)
class TestBias:
    def test_it_is_the_same_by_places(self, name: str, view_of: str) -> None:
        bias, q, part = bias_of(name, view_of)
        whole = bias.whole().expand(2, HEADS, 5, 7)
        trained = [q, *part.parameters()]
        for shape in ((), (1,), (2,), (2, 1), (2, HEADS), (2, HEADS, 4), (1, 1, 4)):
            queries, keys = torch.randint(2, 7, (*shape, 5, 1)), torch.randint(0, 7, (*shape, 1, 6))
            found = bias.among(queries, keys)
            full = (2, HEADS, *shape[2:], 5, 6)
            batch = torch.arange(2).view(-1, *[1] * (len(full) - 1))
            heads = torch.arange(HEADS).view(-1, *[1] * (len(full) - 2))
            asking, asked = ((one[:, None] if one.ndim == 3 else one) for one in (queries, keys))
            wanted = whole[batch, heads, (asking - 2).expand(full), asked.expand(full)]
            torch.testing.assert_close(found.expand(full), wanted)
            if not whole.requires_grad:
                continue
            toward = torch.randn(full, dtype=torch.float64)
            for one, other in zip(
                torch.autograd.grad((found * toward).sum(), trained, allow_unused=True, retain_graph=True),
                torch.autograd.grad((wanted * toward).sum(), trained, allow_unused=True, retain_graph=True),
                strict=True,
            ):
                torch.testing.assert_close(one, other)

    def test_it_is_the_same_in_blocks(self, name: str, view_of: str) -> None:
        bias, _, _ = bias_of(name, view_of)
        whole = bias.whole().expand(2, HEADS, 5, 7)
        for queries, keys in ((range(2, 7), range(7)), (range(3, 5), range(4, 7)), (range(6, 7), range(0, 1))):
            found = bias.block(queries, keys).expand(2, HEADS, -1, -1)
            at = slice(queries.start - 2, queries.stop - 2), slice(keys.start, keys.stop)
            torch.testing.assert_close(found, whole[:, :, *at])
        assert bias.block(range(3, 3), range(2)).shape[-2:] == (0, 2)

    def test_it_can_be_made_of_other_sources(self, name: str, view_of: str) -> None:
        bias, _, _ = bias_of(name, view_of)
        again = bias.remade(tuple(2 * one for one in bias.sources))
        factor = 4 if name == "transformer-xl" else 2
        torch.testing.assert_close(again.whole(), factor * bias.whole())
