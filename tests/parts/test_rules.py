"""Who may look at whom: each rule against its plain meaning, and what a batch makes of it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from polyformer.errors import SpecError
from polyformer.parts import Causal, Rule, SameDocument
from polyformer.parts.flow import GrowingCache, start_flow
from polyformer.parts.rules import All, Everyone
from polyformer.parts.view import View

RULES: list[Rule] = [Everyone(), Causal(), SameDocument(), Causal() & SameDocument()]


def may(rule: Rule, query: int, key: int, documents: list[int] | None) -> bool:
    """The plain meaning of a rule for two places in a sequence."""
    if isinstance(rule, All):
        return all(may(one, query, key, documents) for one in rule.rules)
    if isinstance(rule, Causal):
        return key <= query
    if isinstance(rule, SameDocument):
        return documents is None or documents[query] == documents[key]
    return True


@st.composite
def batches(draw: st.DrawFn) -> tuple[int, int, Tensor | None, Tensor | None]:
    """Draw queries, keys, a mask and document ids."""
    keys = draw(st.integers(1, 7))
    queries = draw(st.integers(1, keys))
    rows = draw(st.integers(1, 3))
    table = st.lists(st.lists(st.integers(0, 2), min_size=keys, max_size=keys), min_size=rows, max_size=rows)
    valid = draw(st.none() | table)
    documents = draw(st.none() | table)
    mask = None if valid is None else torch.tensor(valid) > 0
    return queries, keys, mask, None if documents is None else torch.tensor(documents)


@given(batches(), st.sampled_from(RULES))
def test_masks_are_the_rule_and_the_padding(batch: tuple[int, int, Tensor | None, Tensor | None], rule: Rule) -> None:
    queries, keys, valid, documents = batch
    ids = torch.zeros(1 if valid is None and documents is None else 3, queries)
    ids = ids[: len(valid if valid is not None else documents)] if len(ids) > 1 else ids
    cache = GrowingCache(length=keys - queries) if keys > queries else None
    view = start_flow(ids, valid, documents, cache).view
    mask = view.mask(rule)
    for b in range(len(ids)):
        own = None if documents is None else documents[b].tolist()
        for s in range(queries):
            seen = [may(rule, keys - queries + s, j, own) and (valid is None or bool(valid[b, j])) for j in range(keys)]
            if mask.causal:
                found = [j <= s for j in range(keys)]
                real = valid is None or bool(valid[b, keys - queries + s])
                assert found == seen or not real
                continue
            found = [True] * keys if mask.allowed is None else mask.allowed.expand(len(ids), 1, queries, keys)[b, 0, s]
            empty = mask.empty is not None and bool(mask.empty.expand(len(ids), 1, queries, 1)[b, 0, s])
            if any(seen):
                assert list(found) == seen
                assert not empty
            elif rule.here(view) != Causal() or mask.allowed is not None:
                assert empty
                assert all(found)


class TestAnd:
    def test_it_is_flat_and_forgets_everyone(self) -> None:
        assert Everyone() & Everyone() == Everyone()
        assert Everyone() & Causal() == Causal()
        assert Causal() & Everyone() & Causal() == Causal()
        both = Causal() & SameDocument()
        assert both == All((Causal(), SameDocument()))
        assert both & Causal() == both
        assert (both & (SameDocument() & Causal())) == both

    def test_all_needs_one(self) -> None:
        with pytest.raises(SpecError, match="needs at least one rule"):
            All(())


class TestLowering:
    def test_a_plain_triangle_needs_no_mask(self) -> None:
        mask = start_flow(torch.zeros(2, 5)).view.mask(Causal())
        assert (mask.causal, mask.allowed, mask.empty) == (True, None, None)

    def test_nor_does_padding_on_the_right_under_it(self) -> None:
        valid = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
        mask = start_flow(torch.zeros(2, 5), valid).view.mask(Causal())
        assert (mask.causal, mask.allowed) == (True, None)

    def test_a_mask_of_ones_is_no_mask(self) -> None:
        flow = start_flow(torch.zeros(2, 5), torch.ones(2, 5))
        assert flow.view.mask(Everyone()).allowed is None
        assert flow.rows_valid is None

    def test_a_rule_is_lowered_once_per_batch(self) -> None:
        view = start_flow(torch.zeros(2, 5), torch.tensor([[0, 1, 1, 1, 1]] * 2)).view
        assert view.mask(Causal()) is view.mask(Causal())
        assert view.mask(Causal()) is not view.mask(Everyone())

    def test_a_single_new_token_needs_no_mask(self) -> None:
        mask = start_flow(torch.zeros(2, 1), None, None, GrowingCache(length=6)).view.mask(Causal())
        assert (mask.causal, mask.allowed, mask.empty) == (False, None, None)


class TestShapes:
    @pytest.mark.parametrize("shape", [(2, 4), (2, 6), (1, 5), (3, 5), (2, 5, 1), (5,)])
    def test_a_mask_that_can_not_be_right(self, shape: tuple[int, ...]) -> None:
        with pytest.raises(SpecError, match=r"attention mask has shape .*; 2 rows of 5 tokens need \[2, 5\]"):
            start_flow(torch.zeros(2, 5), torch.ones(shape))

    def test_with_a_cache_both_counts_are_named(self) -> None:
        with pytest.raises(SpecError, match=r"2 rows of 3 cached and 5 new tokens need \[2, 8\]"):
            start_flow(torch.zeros(2, 5), torch.ones(2, 5), None, GrowingCache(length=3))

    def test_documents(self) -> None:
        with pytest.raises(SpecError, match=r"document ids have shape \[2, 4\], not \[2, 5\]"):
            start_flow(torch.zeros(2, 5), None, torch.ones(2, 4))

    def test_a_view_of_other_keys(self) -> None:
        view = View(2, 5, torch.ones(1, 4, dtype=torch.bool), None, False, torch.device("cpu"))
        with pytest.raises(SpecError, match="the attention mask covers 4 keys, but there are 5"):
            view.mask(Everyone())


class TestPositions:
    def test_they_count_real_tokens(self) -> None:
        left = start_flow(torch.zeros(2, 4), torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]]))
        assert left.positions.tolist() == [[0, 0, 0, 1], [0, 1, 2, 3]]
        right = start_flow(torch.zeros(2, 4), torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]]))
        assert right.positions.tolist() == [[0, 1, 2, 3]]

    def test_they_go_on_behind_a_cache(self) -> None:
        valid = torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 1, 1]])
        flow = start_flow(torch.zeros(2, 2), valid, None, GrowingCache(length=3))
        assert flow.positions.tolist() == [[2, 3], [3, 4]]
        assert flow.rows_valid.tolist() == [[True, True], [True, True]]

    def test_they_begin_anew_in_each_document(self) -> None:
        documents = torch.tensor([[4, 4, 4, 0, 0, 4], [1, 2, 3, 3, 3, 3]])
        assert start_flow(torch.zeros(2, 6), None, documents).positions.tolist() == [
            [0, 1, 2, 0, 1, 0],
            [0, 0, 0, 1, 2, 3],
        ]
