"""T5's biases by distance: which bucket a distance is in, who shares a table, and that any model can have them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from polyformer.errors import SpecError
from polyformer.parts import Attention, Buckets, Causal, Chain, Everyone, FeedForward, LayerNorm, Residual, Rule, Stack
from polyformer.parts.flow import GrowingCache, start_flow

# Distances (key - query) and their buckets by the formula of the paper's code, of 32 buckets up to 128.
TWO_SIDED = {0: 0, -1: 1, -7: 7, -8: 8, -11: 8, -12: 9, -15: 9, -16: 10, -63: 13, -64: 14, -90: 14, -91: 15, -500: 15}
ONE_SIDED = {3: 0, 0: 0, -1: 1, -15: 15, -16: 16, -18: 16, -19: 17, -64: 26, -112: 30, -113: 31, -500: 31}


def buckets_of(spec: Buckets, distances: list[int]) -> list[int]:
    """Read the buckets off the biases of a table that holds its own row numbers."""
    part: Any = spec.build()
    with torch.no_grad():
        part.weight.copy_(torch.arange(float(spec.count))[:, None].expand(-1, spec.heads))
    length = max(map(abs, distances)) + 1
    bias = part.bias(torch.zeros(1, spec.heads, length, 4), start_flow(torch.zeros(1, length))).whole()
    assert bias.shape == (1, spec.heads, length, length)
    return [int(bias[0, -1, 0, d] if d >= 0 else bias[0, -1, -d, 0]) for d in distances]


@pytest.mark.parametrize("two_sided", [True, False])
def test_buckets_of_distances(two_sided: bool) -> None:
    known = TWO_SIDED if two_sided else ONE_SIDED
    assert buckets_of(Buckets(2, 32, 128, two_sided), list(known)) == list(known.values())


def test_keys_behind_the_query_have_buckets_of_their_own() -> None:
    after = [-distance for distance in TWO_SIDED if distance]
    expected = [16 + bucket for distance, bucket in TWO_SIDED.items() if distance]
    assert buckets_of(Buckets(2, 32, 128), after) == expected


@pytest.mark.parametrize("two_sided", [True, False])
@pytest.mark.parametrize(("count", "distance"), [(32, 128), (8, 6), (20, 100), (64, 33)])
def test_the_reference_has_the_same_buckets(two_sided: bool, count: int, distance: int) -> None:
    transformers = pytest.importorskip("transformers.models.t5.modeling_t5")
    distances = list(range(-200, 200))
    wanted: Tensor = transformers.T5Attention._relative_position_bucket(
        torch.tensor(distances), two_sided, count, distance
    )
    assert buckets_of(Buckets(2, count, distance, two_sided), distances) == wanted.tolist()


def stack(see: Rule, two_sided: bool) -> Any:
    """Two ordinary pre-norm layers with T5's positions."""
    attention = Attention.of_width(12, 3, see).replace(position=Buckets(3, 8, 6, two_sided))
    layer = Chain((Residual(attention, pre=LayerNorm(12)), Residual(FeedForward.of_widths(12, 24), pre=LayerNorm(12))))
    torch.manual_seed(0)
    made = Stack((layer,) * 2).build()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return made


@pytest.mark.parametrize("see", [Everyone(), Causal()], ids=["everyone", "causal"])
def test_the_bias_is_added_to_the_scores(see: Rule) -> None:
    """One layer's attention, written out."""
    part = stack(see, two_sided=True).blocks[0].steps[0].op
    x = torch.randn(2, 9, 12)
    flow = start_flow(x)
    apart = torch.arange(9) - torch.arange(9)[:, None]
    bias = part.position.weight[part.position._bucket(apart)].permute(2, 0, 1)
    q, k, v = (part.split(one(x), 3) for one in (part.q, part.k, part.v))
    scores = q @ k.mT / 2 + bias
    if see == Causal():
        scores = scores.masked_fill(apart > 0, float("-inf"))
    wanted = part.o((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
    torch.testing.assert_close(part(x, flow), wanted, atol=1e-5, rtol=1e-5)


def test_order_matters_and_place_does_not() -> None:
    part = stack(Everyone(), two_sided=True)
    x = torch.randn(1, 7, 12)
    with torch.no_grad():
        whole = part(x, start_flow(x))
        assert not torch.allclose(part(x.flip(1), start_flow(x)).flip(1), whole, atol=1e-3)
        padded = torch.cat((torch.randn(1, 3, 12), x), 1)
        mask = torch.tensor([[0] * 3 + [1] * 7])
        moved = part(padded, start_flow(padded, mask))[:, 3:]
    torch.testing.assert_close(moved, whole, atol=1e-5, rtol=1e-5)


def test_piece_by_piece() -> None:
    part = stack(Causal(), two_sided=False)
    x = torch.randn(2, 9, 12)
    with torch.no_grad():
        whole = part(x, start_flow(x))
        cache, rows = GrowingCache(), []
        for piece in x.split((4, 1, 3, 1), 1):
            rows.append(part(piece, start_flow(piece, cache=cache)))
            cache.length += piece.shape[1]
    torch.testing.assert_close(torch.cat(rows, 1), whole, atol=1e-5, rtol=1e-5)


def test_layers_of_one_table_share_one_bias() -> None:
    """Worked out once in a pass, and the table gets both layers' gradients."""
    part = stack(Causal(), two_sided=False)
    first, second = (block.steps[0].op.position for block in part.blocks)
    x = torch.randn(1, 5, 12)
    part(x, start_flow(x)).square().sum().backward()
    apart = [first.weight.grad.clone(), second.weight.grad.clone()]
    second.weight = first.weight
    with torch.no_grad():
        flow = start_flow(x)
        assert first.bias(torch.zeros(1, 3, 5, 4), flow) is second.bias(torch.zeros(1, 3, 5, 4), flow)
    first.weight.grad = None
    part(x, start_flow(x)).square().sum().backward()
    assert all(not grad.allclose(first.weight.grad) for grad in apart)
    assert first.weight.grad is second.weight.grad


@pytest.mark.parametrize(
    ("count", "distance", "message"), [(2, 128, "2 buckets are too few"), (32, 8, "a distance of 8 is within the 8")]
)
def test_what_is_refused(count: int, distance: int, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        Buckets(4, count, distance)
