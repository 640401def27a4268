"""Attention by hashing: what it comes to where chunks hold everything, its random turns, its cost, and bad input."""

from __future__ import annotations

import time
from statistics import median

import pytest
import torch
from torch import Tensor

from polyformer.errors import SpecError
from polyformer.parts import (
    Causal,
    Chunks,
    Everyone,
    Hashes,
    Hashing,
    Heads,
    Linear,
    Rule,
    SameDocument,
    Stack,
    Trace,
    Window,
)
from polyformer.parts.flow import GrowingCache, start_flow
from polyformer.parts.hashing import HashingPart
from polyformer.parts.view import View
from tests.spec.trees import WIDTH, hashing

HEADS = Heads(2, 2, 4)


def built(spec: Hashing) -> HashingPart:
    torch.manual_seed(0)
    part = Stack((spec,)).build(dtype=torch.float64).eval().blocks[0]  # type: ignore[index]
    assert isinstance(part, HashingPart)
    with torch.no_grad():
        for weight in part.parameters():
            weight.mul_(3)
    return part


def rows(length: int, batch: int = 2) -> Tensor:
    return torch.randn(batch, length, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(length))


def dense(part: HashingPart, x: Tensor, view: View) -> Tensor:
    """Shared-QK attention as the paper's formula has it: every row at every other one, at itself only in need."""
    q, v = (torch.unflatten(one(x, None), -1, (2, 4)).transpose(1, 2) for one in (part.qk, part.v))
    k = q / (q.square().mean(-1, keepdim=True) + 1e-6).sqrt() / 2
    length = x.shape[1]
    allowed = part.see.allowed(view)
    allowed = torch.ones(1, length, length, dtype=torch.bool) if allowed is None else allowed
    allowed = allowed if view.valid is None else allowed & view.valid[:, None]
    others = allowed & ~torch.eye(length, dtype=torch.bool)
    seen = torch.where(others.any(-1, keepdim=True), others, allowed)[:, None]
    nothing = ~seen.any(-1, keepdim=True)
    weights = (q @ k.mT).masked_fill(~(seen | nothing), -torch.inf).softmax(-1).masked_fill(nothing, 0.0)
    return part.o((weights @ v).transpose(1, 2).flatten(2), None)


RULES = (Everyone(), Causal(), Causal() & Window(3), Causal() & SameDocument())


class TestWhereChunksHoldAll:
    """Then hashing decides nothing."""

    @pytest.mark.parametrize("rule", RULES, ids=str)
    @pytest.mark.parametrize(
        ("chunks", "length"),
        [(Chunks(9), 7), (Chunks(9), 1), (Chunks(4), 4), (Chunks(4, 2, 2), 12), (Chunks(4, 1, 0, "joined"), 8)],
        ids=str,
    )
    def test_it_is_dense_attention(self, chunks: Chunks, length: int, rule: Rule) -> None:
        part, x = built(hashing(chunks=chunks, see=rule)), rows(length)
        flow = start_flow(x)
        torch.testing.assert_close(part(x, flow), dense(part, x, flow.view))

    @pytest.mark.parametrize("rule", RULES, ids=str)
    def test_in_rounds_with_padding_and_documents(self, rule: Rule) -> None:
        spec = hashing(chunks=Chunks(5, 2, 2), see=rule, hashes=Hashes(3, (2, 2), seed=3))
        part, x = built(spec), rows(11)
        valid = torch.tensor([[1] * 8 + [0] * 3, [0, 0] + [1] * 9])
        documents = torch.tensor([[7] * 4 + [2] * 7, [0] * 11])
        flow = start_flow(x, valid, documents if SameDocument() in getattr(rule, "rules", ()) else None)
        found, wanted = part(x, flow), dense(part, x, flow.view)
        torch.testing.assert_close(found[valid.bool()], wanted[valid.bool()], rtol=1e-9, atol=1e-9)

    def test_its_weights_are_those_that_it_mixes_with(self) -> None:
        part, x = built(hashing(hashes=Hashes(3, (4,), seed=2))), rows(13)
        flow = start_flow(x)
        flow.trace = Trace(wants=frozenset(("attention",)))
        found = part(x, flow)
        (weights,) = flow.trace.attention.values()
        v = torch.unflatten(part.v(x, flow), -1, (2, 4)).transpose(1, 2)
        torch.testing.assert_close(part.o((weights @ v).transpose(1, 2).flatten(2), flow), found)
        torch.testing.assert_close(weights.sum(-1), torch.ones(2, 2, 13, dtype=torch.float64), rtol=0, atol=1e-9)
        assert not weights.triu(1).any()


class TestTurns:
    def test_a_seed_draws_what_seeding_everything_would(self) -> None:
        torch.manual_seed(11)
        wanted = torch.randn(2, 4, 3, 5)
        torch.manual_seed(0)
        before = torch.get_rng_state()
        assert torch.equal(Hashes(seed=11).turns((2, 4, 3, 5), torch.device("cpu")), wanted)
        assert torch.equal(torch.get_rng_state(), before)

    def test_without_a_seed_each_pass_draws_its_own(self) -> None:
        part, x = built(hashing(hashes=Hashes(buckets=(4,)))), rows(32)
        first, second = part(x, start_flow(x)), part(x, start_flow(x))
        assert not torch.equal(first, second)
        torch.manual_seed(5)
        third = part(x, start_flow(x))
        torch.manual_seed(5)
        assert torch.equal(part(x, start_flow(x)), third)

    @pytest.mark.parametrize(
        ("length", "size", "limit", "wanted"),
        [(8, 4, None, (4,)), (24, 4, None, (8,)), (64, 4, None, (4, 8)), (64, 4, 32, (32,)), (2, 1, None, (2, 2))],
    )
    def test_how_many_buckets_there_are(self, length: int, size: int, limit: int, wanted: tuple[int, ...]) -> None:
        assert Hashes(limit=limit).factors(length, size) == wanted

    def test_rows_alike_share_a_chunk(self) -> None:
        """Rows of four directions, shuffled, in chunks of their number: each looks at its own kind only."""
        part = built(hashing(chunks=Chunks(8, 0), see=Everyone(), hashes=Hashes(buckets=(8,), seed=4)))
        kinds = torch.arange(32) % 4
        x = 5 * torch.randn(4, WIDTH, dtype=torch.float64)[kinds][None]
        flow = start_flow(x)
        flow.trace = Trace(wants=frozenset(("attention",)))
        part(x, flow)
        (weights,) = flow.trace.attention.values()
        alike = kinds[:, None] == kinds
        assert weights.masked_fill(~alike, 0.0).sum() > 0.7 * weights.sum()  # two kinds may fall into one bucket


def test_a_row_of_nothing_and_of_nobody() -> None:
    part = built(hashing())
    x = rows(5)[:, :0]
    assert part(x, start_flow(x)).shape == (2, 0, WIDTH)
    x = rows(5)
    found = part(x, start_flow(x, torch.tensor([[1] * 5, [0] * 5])))
    assert found.isfinite().all()
    assert not found[1].any()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Hashes(buckets=(3,)), "a number of buckets must be even, half of them opposite to the others, not 3"),
        (lambda: Hashes(buckets=(4, 5)), "must be even"),
        (lambda: Hashes(buckets=()), "buckets need at least one factor"),
        (lambda: Hashes(rounds=0), "rounds must be at least 1, not 0"),
        (lambda: Hashes(limit=1), "limit must be at least 2, not 1"),
        (lambda: Chunks(0), "size must be at least 1, not 0"),
        (lambda: Chunks(4, -1), "before and after can't be negative"),
        (lambda: Chunks(4, multiple=8), "only chunks whose ends are joined need a multiple"),
        (lambda: Chunks(4, ends="joined", multiple=6), "multiple 6 is none of the size 4"),
        (lambda: Chunks(4, whole=5), "whole must be between 0 and the size 4, not 5"),
        (lambda: hashing(heads=Heads(2, 1, 4)), "each head hashes its own keys"),
        (lambda: hashing(qk=Linear(WIDTH, 12)), "qk gives 12 values, but 2 heads of width 4 make 8"),
        (lambda: hashing(o=Linear(12, WIDTH)), "o takes 12 values"),
        (lambda: hashing(dropout=1.0), r"dropout must be in \[0, 1\), not 1.0"),
    ],
)
def test_what_can_not_be(make, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        make()


def test_it_has_no_cache_and_says_why() -> None:
    part, x = built(hashing()), rows(4)
    with pytest.raises(SpecError, match="Hashing can't be cached: rows share chunks with rows behind them"):
        part(x, start_flow(x, cache=GrowingCache()))
    with pytest.raises(SpecError, match="Hashing can't be packed: its rule lets documents look at each other"):
        built(hashing(see=Causal()))(x, start_flow(x, documents=torch.zeros(2, 4, dtype=torch.long)))


@pytest.mark.slow
def test_its_cost_is_near_linear() -> None:
    """Between 2048 and 16384 rows, the exponent of time in training is far below that of dense attention."""
    times, lengths = [], (2048, 16384)
    part = Stack((Hashing.of_width(64, Heads(2, 2, 32), Chunks(64), Causal(), Hashes(2, seed=0)),)).build().train()
    for length in lengths:
        x = torch.randn(1, length, 64, requires_grad=True)
        laps = []
        for _ in range(4):
            start = time.process_time()
            part(x, start_flow(x)).sum().backward()
            laps.append(time.process_time() - start)
        times.append(median(laps[1:]))
    exponent = torch.tensor(times[1] / times[0]).log2() / 3
    assert exponent < 1.3, f"time grows with n^{exponent:.2f}"


def test_more_rounds_find_more_of_dense_attention() -> None:
    x, apart = 4 * rows(64, 1), []
    for rounds in (1, 16):
        part = built(hashing(chunks=Chunks(4), see=Everyone(), hashes=Hashes(rounds, (16,), seed=7)))
        flow = start_flow(x)
        apart.append(float((part(x, flow) - dense(part, x, flow.view)).detach().square().mean()))
    assert apart[1] < apart[0] / 2
