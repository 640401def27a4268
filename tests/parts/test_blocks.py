"""Rules of blocks, of random ones, and of marked tokens: each against its plain meaning, and what is lowered of it."""

from __future__ import annotations

import pytest
import torch

from polyformer.errors import SpecError
from polyformer.parts import (
    Beyond,
    BlockWindow,
    Causal,
    Differs,
    Edges,
    Either,
    Everyone,
    InTraining,
    Marked,
    Nobody,
    RandomBlocks,
    Refuses,
    Rule,
    SameDocument,
    Softmax,
    Window,
)
from polyformer.parts.blocks import draw, needed, scattered
from polyformer.parts.flow import start_flow
from polyformer.parts.rules import All
from polyformer.parts.view import View

LENGTH, MARKED = 23, (2, 3, 11)
DRAWN = RandomBlocks(2, 1, 4, seed=3)
PATTERN = BlockWindow(2) | Edges(2)
RULES: dict[str, Rule] = {
    "window of blocks": BlockWindow(3),
    "own block": BlockWindow(4, 0),
    "ends": Edges(4, 1, 2),
    "first tokens": Edges(1, 3, 0),
    "drawn": DRAWN,
    "BigBird": PATTERN | InTraining(DRAWN),
    "beyond": Beyond(9, PATTERN),
    "marked": Window(3) | Marked(),
    "marked in documents": (Window(2) | Marked()) & SameDocument(),
    "causal": Causal() & (Window(2) | Edges(3, 1, 0)),
    "nobody": Nobody(),
}
rules = pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())


def view_of(length: int = LENGTH, documents: bool = True) -> View:
    places = torch.arange(length)
    view = start_flow(torch.zeros(1, length), None, (places // 8)[None] if documents else None).view
    return view.marking(torch.isin(places, torch.tensor(MARKED))[None])


def may(rule: Rule, head: int, s: int, k: int) -> bool:
    """The plain meaning of a rule for two places of `LENGTH`."""
    if isinstance(rule, All):
        return all(may(one, head, s, k) for one in rule.rules)
    if isinstance(rule, Either):
        return any(may(one, head, s, k) for one in rule.rules)
    if isinstance(rule, Beyond | InTraining):
        return may(rule.rule, head, s, k)
    if isinstance(rule, BlockWindow):
        return abs(s // rule.block - k // rule.block) <= rule.sides
    if isinstance(rule, Edges):
        blocks = [range(i, min(i + rule.block, LENGTH)) for i in range(0, LENGTH, rule.block)]
        ends = [*blocks[: rule.first], *(blocks[-rule.last :] if rule.last else [])]
        return any(s in one or k in one for one in ends)
    if isinstance(rule, RandomBlocks):
        return k // rule.block in draw(rule, -(-LENGTH // rule.block))[head, s // rule.block].tolist()
    if isinstance(rule, Window):
        return abs(s - k) < rule.width
    if isinstance(rule, Causal):
        return k <= s
    if isinstance(rule, SameDocument):
        return s // 8 == k // 8
    return isinstance(rule, Marked) and k in MARKED


@rules
def test_the_plain_meaning(rule: Rule) -> None:
    found = view_of().everywhere(rule)
    assert found is not None
    found = found.expand(1, 4, LENGTH, LENGTH)[0].tolist()
    for head in range(4):
        for s in range(LENGTH):
            assert found[head][s] == [may(rule, head, s, k) for k in range(LENGTH)], (head, s)


@rules
@pytest.mark.parametrize("size", [1, 2, 3, 8, 30])
def test_what_is_needed_leaves_nothing_out(rule: Rule, size: int) -> None:
    view = view_of()
    here = rule.here(view)
    blocks, allowed = needed(here, view, size), view.everywhere(here)
    assert allowed is not None
    beside = scattered(here, view)
    allowed = allowed.clone().squeeze(0)
    if beside is not None:
        assert sorted(beside[0].tolist()) == list(MARKED)
        allowed[..., list(MARKED)] = False
    for h, s, k in allowed.nonzero().tolist():
        assert blocks[min(h, len(blocks) - 1), s // size, k // size]


@rules
def test_runs_of_keys(rule: Rule) -> None:
    view = view_of()
    here = rule.here(view)
    allowed = view.everywhere(here)
    assert allowed is not None
    for start in range(0, LENGTH, 3):
        queries = range(start, min(start + 4, LENGTH))
        seen = allowed[0, :, start : queries.stop].any(0).any(0).nonzero()[:, 0].tolist()
        assert set(seen) <= set(here.reach(view, queries))
        for first in range(0, LENGTH, 5):
            keys = range(first, min(first + 4, LENGTH))
            if here.opens(view, queries, keys):
                assert allowed[0, :, start : queries.stop, first : keys.stop].all()


class TestOr:
    def test_it_is_flat_and_forgets_nobody(self) -> None:
        assert Nobody() | Nobody() == Nobody()
        assert Nobody() | Causal() == Causal()
        assert Everyone() | Causal() == Everyone()
        assert Window(3) | Edges(2) | Window(3) == Either((Window(3), Edges(2)))
        assert (Window(3) | Edges(2)) & SameDocument() == All((Either((Window(3), Edges(2))), SameDocument()))

    def test_either_needs_one(self) -> None:
        with pytest.raises(SpecError, match="needs at least one rule"):
            Either(())

    def test_everyone_in_it_opens_all(self) -> None:
        view = view_of(documents=False)
        assert Either((Window(3), Everyone())).among(view, *view.pairs(range(3), range(3))) is None
        assert Either((Window(30), Edges(2))).here(view) == Everyone()


class TestInBatches:
    def test_what_is_for_training_is_laid_aside(self) -> None:
        rule = Beyond(9, PATTERN | InTraining(DRAWN)) & SameDocument()
        assert rule.settled() == Beyond(9, PATTERN) & SameDocument()
        assert InTraining(DRAWN).settled() == Nobody()

    def test_short_rows_see_everyone(self) -> None:
        rule = Beyond(9, PATTERN)
        assert rule.here(view_of(9)) == Everyone()
        assert rule.here(view_of(10)) == PATTERN

    def test_without_marks_nobody_is_marked(self) -> None:
        view = start_flow(torch.zeros(1, 5)).view
        assert (Window(2) | Marked()).here(view) == Window(2)
        assert not Marked().among(view, *view.pairs(range(5), range(5))).any()  # type: ignore[union-attr]

    def test_heads_apart_are_no_single_mask(self) -> None:
        with pytest.raises(SpecError, match="means something else for each head"):
            DRAWN.allowed(view_of())


class TestContract:
    def test_ends_of_the_row_move(self) -> None:
        broken = (PATTERN & SameDocument()).breaks()
        assert isinstance(broken["padded on the left"], Differs)
        assert isinstance(broken["padded on the right"], Differs)
        assert isinstance(broken["cached"], Refuses)
        assert broken["packed"] == Refuses("its rule counts from the ends of the row, not of each document")

    def test_causal_blocks_from_the_left_can_be_cached(self) -> None:
        broken = (Causal() & (BlockWindow(2) | Edges(2, last=0)) & SameDocument()).breaks()
        assert set(broken) == {"padded on the left", "packed"}

    def test_a_causal_rule_that_counts_from_the_right_can_not(self) -> None:
        told = (Causal() & Edges(2) & SameDocument()).breaks()["cached"]
        assert told == Refuses("its rule counts from the right end of the row, which moves as the row grows")

    def test_what_counts_from_the_left_end_forgets_nothing(self) -> None:
        view = view_of(documents=False)
        assert (Causal() & Window(3)).looks_back(view) is not None
        assert (Causal() & Window(3) & BlockWindow(2)).looks_back(view) is None
        assert not (Causal() & Window(3) & BlockWindow(2)).forgetful

    def test_longformer_s_holds_all_but_caching(self) -> None:
        assert set(((Window(3) | Marked()) & SameDocument()).breaks()) == {"cached"}


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: BlockWindow(0), "block must be at least 1"),
        (lambda: BlockWindow(2, -1), "sides must be at least 0"),
        (lambda: Edges(0), "block must be at least 1"),
        (lambda: Edges(2, -1), "first and last must be at least 0"),
        (lambda: RandomBlocks(2, 0, 4), "block, count and heads must be at least 1"),
        (lambda: RandomBlocks(2, 1, 4, -1), r"seed must be in \[0, 2\^32\), not -1"),
        (lambda: RandomBlocks(2, 1, 4, 0, 0), "longest must be at least 1"),
        (lambda: Beyond(-1, Causal()), "length must be at least 0"),
    ],
)
def test_bad_settings(make, told: str) -> None:
    with pytest.raises(SpecError, match=told):
        make()


def test_the_dense_kernel_follows_heads_apart() -> None:
    from polyformer.parts import Context

    view = view_of()
    q, k, v = torch.randn(3, 1, 4, LENGTH, 3)
    part = Softmax().build()
    weights = part.weights(q, k, Context(DRAWN | BlockWindow(2), view))  # type: ignore[operator]
    allowed = view.everywhere(DRAWN | BlockWindow(2))
    assert ((weights > 0) == allowed).all()
    torch.testing.assert_close(part.attend((q, k, v), Context(DRAWN | BlockWindow(2), view)), weights @ v)  # type: ignore[operator]
