"""Local attention: what a mask of neighbouring chunks gives, wherever padding, documents and caches put the rows."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from polyformer.errors import SpecError
from polyformer.parts import (
    Alibi,
    Attention,
    Causal,
    Chunks,
    CrossAttention,
    Everyone,
    Heads,
    Local,
    Rule,
    SameDocument,
    Shaw,
    Softmax,
    Stack,
    Trace,
    Window,
)
from polyformer.parts.attention import AttentionPart
from polyformer.parts.flow import Flow, GrowingCache, start_flow
from tests.spec.trees import WIDTH

HEADS = Heads(4, 2, 4)
BOTH, ONE = Everyone(), Causal()
AROUND = (Chunks(3), Chunks(3, 0), Chunks(3, 2), Chunks(2, 1, 1), Chunks(1, 1, 2), Chunks(20))


def built(chunks: Chunks, rule: Rule, **fields: object) -> AttentionPart:
    torch.manual_seed(0)
    spec = Attention.of_heads(WIDTH, HEADS, rule).replace(**{"kernel": Local(chunks)} | fields)
    part = Stack((spec,)).build(dtype=torch.float64).eval().blocks[0]  # type: ignore[index]
    assert isinstance(part, AttentionPart)
    return part


def rows(length: int, batch: int = 2) -> Tensor:
    return torch.randn(batch, length, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(length))


def near(chunks: Chunks, places: Tensor) -> Tensor:
    """Tell where a key [B, K] stands in a chunk that the query's looks at: boolean [B, K, K]."""
    chunk = places // chunks.size
    apart = chunk[:, None, :] - chunk[:, :, None]
    return (apart >= -chunks.before) & (apart <= chunks.after)


def dense(part: AttentionPart, x: Tensor, flow: Flow, allowed: Tensor) -> Tensor:
    """The same attention over all scores, as far as `allowed` [B, K, K]."""
    weights = Attention.of_heads(WIDTH, HEADS, part.see).replace(position=part.spec.position)
    whole = Stack((weights,)).build(dtype=torch.float64).blocks[0]  # type: ignore[index]
    whole.load_state_dict(part.state_dict())

    class Masked(Rule, abstract=True):
        def among(self, view: object, queries: Tensor, keys: Tensor) -> Tensor:
            return allowed[:, None]

        def opens(self, view: object, queries: range, keys: range) -> bool:
            return False

    whole.see = whole.settled = Masked()
    whole.kernel = Softmax().module()
    return whole(x, flow)


@pytest.mark.parametrize("rule", [BOTH, ONE, Causal() & Window(2)], ids=str)
@pytest.mark.parametrize("chunks", AROUND, ids=str)
@pytest.mark.parametrize("length", [1, 6, 7])
def test_it_is_dense_attention_in_a_mask(chunks: Chunks, rule: Rule, length: int) -> None:
    part, x = built(chunks, rule), rows(length)
    flow = start_flow(x)
    allowed = near(chunks, torch.arange(length)[None])
    own = rule.allowed(flow.view)
    allowed = allowed if own is None else allowed & own
    torch.testing.assert_close(part(x, flow), dense(part, x, start_flow(x), allowed))


@pytest.mark.parametrize("chunks", AROUND, ids=str)
@pytest.mark.parametrize("position", [Alibi(4), Shaw(4, 3)], ids=["alibi", "shaw"])
def test_score_biases_are_added(chunks: Chunks, position: object) -> None:
    part, x = built(chunks, BOTH, position=position), rows(8)
    allowed = near(chunks, torch.arange(8)[None])
    torch.testing.assert_close(part(x, start_flow(x)), dense(part, x, start_flow(x), allowed))


@pytest.mark.parametrize("chunks", AROUND, ids=str)
def test_chunks_begin_with_a_text_and_with_a_document(chunks: Chunks) -> None:
    """Neither padding before a text nor a document before it moves the borders of its chunks."""
    part, x = built(chunks, Causal() & SameDocument()), rows(9)
    valid = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1, 0, 0]])
    found = part(x, start_flow(x, valid))
    torch.testing.assert_close(found[0, 2:], part(x[:1, 2:], start_flow(x[:1, 2:]))[0])
    torch.testing.assert_close(found[1, :7], part(x[1:, :7], start_flow(x[1:, :7]))[0])
    documents = torch.tensor([[5] * 4 + [1] * 5, [0] * 2 + [3] * 7])
    found = part(x, start_flow(x, None, documents))
    torch.testing.assert_close(found[0, 4:], part(x[:1, 4:], start_flow(x[:1, 4:]))[0])
    torch.testing.assert_close(found[1, :2], part(x[1:, :2], start_flow(x[1:, :2]))[0])


@pytest.mark.parametrize("cuts", [(1,) * 11, (4, 1, 5, 1), (10, 1)])
def test_a_padded_prompt_that_goes_on(cuts: tuple[int, ...]) -> None:
    """Padding then stands between the rows of a text, in which places are counted without it."""
    part, x = built(Chunks(3, 1), ONE), rows(11)
    valid = torch.tensor([[1, 1, 1, 1, 0, 0, 1, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1]]).bool()
    cache, found, done = GrowingCache(), [], 0
    for piece in x.split(cuts, 1):
        done += piece.shape[1]
        found.append(part(piece, start_flow(piece, valid[:, :done], cache=cache)))
        cache.length = done
    for one, other, real in zip(torch.cat(found, 1), x, valid, strict=True):
        alone = part(other[real][None], start_flow(other[real][None]))[0]
        torch.testing.assert_close(one[real], alone)


@pytest.mark.parametrize("chunks", [Chunks(3), Chunks(2, 1, 1, "joined")], ids=str)
def test_its_weights_are_those_that_it_mixes_with(chunks: Chunks) -> None:
    part, x = built(chunks, SameDocument()), rows(8)
    flow = start_flow(x, torch.tensor([[1] * 8, [0] * 5 + [1] * 3]))
    flow.trace = Trace(wants=frozenset(("attention",)))
    found = part(x, flow)
    (weights,) = flow.trace.attention.values()
    v = part.split(part.v(x, flow), 2).repeat_interleave(2, 1)
    mixed = part.o((weights @ v).transpose(1, 2).flatten(2), flow)
    torch.testing.assert_close(mixed[0], found[0])
    torch.testing.assert_close(mixed[1, 5:], found[1, 5:])


def test_a_short_circle_counts_a_chunk_twice() -> None:
    """As published: with a chunk before and one behind, two chunks see each other twice."""
    part, x = built(Chunks(2, 1, 1, "joined"), BOTH), rows(4)
    flow = start_flow(x)
    q, k, v = part.split(part.q(x, flow), 4), part.split(part.k(x, flow), 2), part.split(part.v(x, flow), 2)
    k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
    twice = (near(Chunks(2, 0), torch.arange(4)[None]) ^ True).double() + 1
    weights = (q @ k.mT / 2 + twice.log()).softmax(-1)
    torch.testing.assert_close(part(x, flow), part.o((weights @ v).transpose(1, 2).flatten(2), flow))


def test_nothing_to_look_at_gives_zeros() -> None:
    part, x = built(Chunks(2), BOTH), rows(5)
    found = part(x, start_flow(x, torch.tensor([[1] * 5, [0] * 5])))
    assert found.isfinite().all()
    assert not found[1].any()
    assert part(x[:, :0], start_flow(x[:, :0])).shape == (2, 0, WIDTH)


def test_in_half_precision_and_with_dropout() -> None:
    part, x = built(Chunks(2), ONE).to(torch.bfloat16), rows(7)
    found = part(x.bfloat16(), start_flow(x))
    assert found.dtype == torch.bfloat16
    wanted = built(Chunks(2), ONE)(x, start_flow(x))
    assert (found.double() - wanted).abs().mean() < 0.02 * wanted.std() + 0.01
    kernel = Local(Chunks(2), dropout=0.5)
    dropping = built(Chunks(2), ONE, kernel=kernel).train()
    assert not torch.equal(dropping(x, start_flow(x)), dropping(x, start_flow(x)))


def test_what_can_not_be() -> None:
    with pytest.raises(SpecError, match=r"dropout must be in \[0, 1\), not 1.0"):
        Local(Chunks(2), dropout=1.0)
    with pytest.raises(SpecError, match="Local can't look at an encoder's output: its chunks are those of one text"):
        CrossAttention.of_width(WIDTH, 2).replace(kernel=Local(Chunks(2)))
    x = rows(6)
    circle = built(Chunks(2, 2, 0, "joined"), Causal() & SameDocument())
    with pytest.raises(SpecError, match="Local can't be cached: its chunks stand in a circle"):
        circle(x, start_flow(x, cache=GrowingCache()))
    with pytest.raises(SpecError, match="Local can't be packed: its chunks stand in one circle"):
        circle(x, start_flow(x, documents=torch.zeros(2, 6, dtype=torch.long)))
