"""ALiBi and Shaw's distances by their equations, wherever padding, documents and caches put the rows."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from torch import Tensor

from polyformer.errors import SpecError
from polyformer.parts import (
    Alibi,
    Attention,
    Buckets,
    Causal,
    Embed,
    Everyone,
    LayerNorm,
    Linear,
    LMHead,
    RelativePosition,
    Residual,
    Rotary,
    Rule,
    SameDocument,
    Shaw,
    Stack,
    TokenEmbedding,
    Transformer,
    Window,
)
from polyformer.parts.flow import Flow, GrowingCache, start_flow
from tests.parts.models import build, pad, sentences

HEADS, WIDTH = 3, 12


def flow_of(length: int, past: int = 0, mask: Tensor | None = None) -> Flow:
    cache = GrowingCache(length=past)
    return start_flow(torch.zeros(1 if mask is None else len(mask), length), mask, None, cache)


def bias_of(spec: RelativePosition, q: Tensor, flow: Flow) -> Tensor:
    return cast(Any, spec.build(dtype=q.dtype)).bias(q, flow).whole()


@pytest.mark.parametrize("queries", [1, 3, 7])
def test_alibi_by_its_equation(queries: int) -> None:
    """Section 3: for 8 heads, the slopes are 1/2, 1/4, …, 1/256."""
    found = bias_of(Alibi(8), torch.randn(2, 8, queries, 4), flow_of(queries, past=7 - queries))
    assert found.shape == (1, 8, queries, 7)
    for head in range(8):
        for s in range(queries):
            for k in range(7):
                distance = abs(7 - queries + s - k)
                assert float(found[0, head, s, k]) == pytest.approx(-distance / 2 ** (head + 1))


@pytest.mark.parametrize("heads", [1, 2, 3, 6, 12, 16, 71])
@pytest.mark.parametrize("steepest", [8.0, 4.0])
def test_the_slopes_of_the_authors(heads: int, steepest: float) -> None:
    """Every second slope of the next power of two fills up, as in MPT's formulation of the same."""
    above = 1
    while above < heads:
        above *= 2
    all_of_them = [2 ** (-steepest * i / above) for i in range(1, above + 1)]
    expected = all_of_them if above == heads else (all_of_them[1::2] + all_of_them[::2])[:heads]
    assert Alibi(heads, steepest).slopes() == pytest.approx(expected)


def test_alibi_of_scaled_scores() -> None:
    q, flow = torch.randn(1, 4, 5, 4), flow_of(5)
    torch.testing.assert_close(bias_of(Alibi(4, scale=0.25), q, flow), bias_of(Alibi(4), q, flow) / 4)


def test_alibi_with_rounded_steps() -> None:
    """Falcon adds slope · place, in bfloat16: the same to a softmax, but for steps of eight bits."""
    q, flow = torch.randn(1, 12, 6, 4), flow_of(6, past=994)
    rounded, exact = bias_of(Alibi(12, precision="bfloat16"), q, flow), bias_of(Alibi(12), q, flow)
    assert rounded.shape == (1, 12, 6, 1000)
    slopes, places = torch.tensor(Alibi(12).slopes()).bfloat16(), torch.arange(1000).bfloat16()
    assert rounded[0, :, 2].equal((slopes[:, None] * places).float())
    own, steps = (one - one[..., :1] for one in (exact, rounded))
    apart = (torch.where(torch.arange(1000) <= torch.arange(994, 1000)[:, None], own - steps, 0.0)).abs()
    assert float(apart.max()) > 1
    assert float(apart.max()) < 1000 * 2**-7
    for one in (bias_of(Alibi(4, precision="bfloat16"), q[:, :4], flow_of(6)), bias_of(Alibi(4), q[:, :4], flow_of(6))):
        seen = (one + torch.full((6, 6), -torch.inf).triu(1)).softmax(-1)
        torch.testing.assert_close(seen[0, 1, 5], (torch.arange(6) / 16.0).softmax(-1))


@pytest.mark.parametrize(("queries", "keys"), [(6, 6), (1, 6), (2, 9)])
def test_shaw_by_equation_4(queries: int, keys: int) -> None:
    spec = Shaw(width=4, distance=2)
    part = cast(Any, spec.build(dtype=torch.float64))
    torch.nn.init.normal_(part.weight)
    q = torch.randn(2, HEADS, queries, 4, dtype=torch.float64)
    found = part.bias(q, flow_of(queries, past=keys - queries)).whole()
    for s in range(queries):
        for k in range(keys):
            vector = part.weight[max(-2, min(2, k - (keys - queries + s))) + 2]
            torch.testing.assert_close(found[:, :, s, k], q[:, :, s] @ vector / 2)
    found.sum().backward()
    assert part.weight.grad.abs().sum() > 0


POSITIONS: dict[str, RelativePosition | None] = {
    "alibi": Alibi(HEADS),
    "alibi in steps": Alibi(HEADS, precision="bfloat16"),
    "shaw": Shaw(WIDTH // HEADS, distance=3),
    "buckets": Buckets(HEADS, count=8, distance=12),
    "rotary": Rotary(WIDTH // HEADS, 100.0),
    "window": None,
}
schemes = pytest.mark.parametrize("name", POSITIONS)
sides = pytest.mark.parametrize("side", ["left", "right"])


def decoder(name: str, see: Rule | None = None) -> Any:
    """Return a small language model that knows order by one scheme only."""
    rule = Causal() & SameDocument() & (Window(3) if name == "window" else Everyone())
    attention = Attention.of_width(WIDTH, HEADS, see or rule).replace(position=POSITIONS[name])
    block = Residual(attention, pre=LayerNorm(WIDTH))
    head = LMHead(Linear(WIDTH, 17))
    return build(Transformer(target=Embed(TokenEmbedding(17, WIDTH)), decoder=Stack((block, block)), head=head))


def alone(model: Any, row: Tensor) -> Tensor:
    return model(row[None]).hidden[0]


@schemes
def test_order_matters(name: str) -> None:
    model, (row,) = decoder(name), sentences((6,))
    swapped = row[[1, 0, 2, 3, 4, 5]]
    assert not torch.allclose(alone(model, row)[5], alone(model, swapped)[5], atol=1e-4)


@schemes
@sides
def test_padding_changes_nothing(name: str, side: str) -> None:
    model, rows = decoder(name), sentences((5, 1, 9))
    ids, mask = pad(rows, side, 11)
    hidden = model(ids, mask).hidden
    for i, row in enumerate(rows):
        torch.testing.assert_close(hidden[i][mask[i].bool()], alone(model, row))


@schemes
def test_documents_don_t_meet(name: str) -> None:
    model, rows = decoder(name), sentences((5, 4, 3))
    numbers = torch.cat([torch.full((len(row),), i) for i, row in enumerate(rows)])
    hidden = model(torch.cat(rows)[None], document_ids=numbers[None]).hidden[0]
    torch.testing.assert_close(hidden, torch.cat([alone(model, row) for row in rows]))


@schemes
@pytest.mark.parametrize("cuts", [(1,) * 9, (4, 3, 1, 1)], ids=["one by one", "in chunks"])
def test_cached_is_full(name: str, cuts: tuple[int, ...]) -> None:
    model, (row,) = decoder(name), sentences((9,))
    cache = GrowingCache()
    found = [model(piece[None], cache=cache).hidden[0] for piece in row.split(cuts)]
    torch.testing.assert_close(torch.cat(found), alone(model, row))


@schemes
def test_a_padded_prompt_is_continued(name: str) -> None:
    """Padding then stands between real tokens; it adds nothing to their distances."""
    model, rows, tails = decoder(name), sentences((3, 6)), sentences((5, 5), seed=1)
    ids, mask = pad(rows)
    cache = GrowingCache()
    model(ids, mask, cache=cache)
    found = []
    for piece in torch.stack(tails).split((1, 2, 2), 1):
        mask = torch.cat((mask, torch.ones_like(piece)), 1)
        found.append(model(piece, mask, cache=cache).hidden)
    wanted = [alone(model, torch.cat((r, t)))[len(r) :] for r, t in zip(rows, tails, strict=True)]
    torch.testing.assert_close(torch.cat(found, 1), torch.stack(wanted))


def test_an_encoder_looks_to_both_sides() -> None:
    model, (row,) = decoder("alibi", Everyone()), sentences((6,))
    torch.testing.assert_close(alone(model, row.flip(0)).flip(0), alone(model, row))


def test_refused() -> None:
    with pytest.raises(SpecError, match="heads must be at least 1"):
        Alibi(0)
    with pytest.raises(SpecError, match="width and distance must be at least 1"):
        Shaw(4, 0)
