"""Attention against a computation that goes key by key: rules, padding, head layouts, gradients, several hypotheses."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from polyformer.errors import SpecError
from polyformer.parts import (
    Attention,
    Causal,
    Context,
    CrossAttention,
    Linear,
    Rule,
    SameDocument,
    Softmax,
    Stack,
    Trace,
)
from polyformer.parts.attention import Projected
from polyformer.parts.flow import Flow, GrowingCache, start_flow
from polyformer.parts.part import Part
from polyformer.parts.rules import Everyone
from polyformer.parts.view import View
from tests.parts.models import WIDTH, attention, cross
from tests.parts.reference import Plain, attend
from tests.parts.test_rules import may

LAYOUTS = {"multi-head": (4, 4), "grouped": (6, 2), "multi-query": (3, 1), "one head": (1, 1)}
layouts = pytest.mark.parametrize(("heads", "groups"), LAYOUTS.values(), ids=LAYOUTS.keys())
RULES: dict[str, Rule] = {
    "everyone": Everyone(),
    "causal": Causal(),
    "documents": SameDocument(),
    "both": Causal() & SameDocument(),
}
rules = pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
PADDINGS = {
    "none": [[1] * 5] * 3,
    "left": [[0, 0, 1, 1, 1], [1] * 5, [0, 0, 0, 0, 1]],
    "right": [[1, 1, 0, 0, 0], [1] * 5, [1, 0, 0, 0, 0]],
    "holes and an empty row": [[1, 0, 1, 0, 1], [0] * 5, [0, 1, 0, 0, 1]],
}
paddings = pytest.mark.parametrize("padding", PADDINGS.values(), ids=PADDINGS.keys())
DOCUMENTS = [[0, 0, 1, 1, 1], [3, 1, 1, 1, 2], [0, 0, 0, 0, 5]]


def drawn(part: Part) -> Part:
    for weight in part.parameters():
        torch.nn.init.normal_(weight, std=0.5)
    return part.double().eval()


def cut(part: Projected, x: Tensor, name: str, count: int) -> Tensor:
    """Project and cut into heads by hand: [B, S, D] -> [B, count, S, E]."""
    linear = getattr(part, name)
    heads = (x @ linear.weight.T + linear.bias).unflatten(-1, (count, part.heads.width))
    return torch.stack([heads[:, :, h] for h in range(count)], 1)


def by_hand(part: Projected, x: Tensor, memory: Tensor, see) -> Tensor:
    heads, groups = part.heads.count, part.heads.groups
    q, k, v = cut(part, x, "q", heads), cut(part, memory, "k", groups), cut(part, memory, "v", groups)
    mixed = attend(q, k, v, see)
    side_by_side = torch.cat([mixed[:, h] for h in range(heads)], -1)
    return side_by_side @ part.o.weight.T + part.o.bias


def x_of(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def assert_same_with_gradients(part: Part, x: Tensor, found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected)
    wanted = [x, *part.parameters()]
    factor = torch.randn_like(found)
    for one, other in zip(
        torch.autograd.grad((found * factor).sum(), wanted),
        torch.autograd.grad((expected * factor).sum(), wanted),
        strict=True,
    ):
        torch.testing.assert_close(one, other)


@layouts
@rules
class TestSelfAttention:
    @paddings
    def test_key_by_key(self, heads: int, groups: int, rule: Rule, padding: list[list[int]]) -> None:
        part = drawn(attention(heads, groups, rule).build())
        x = x_of(3, 5, WIDTH)
        documents = torch.tensor(DOCUMENTS) if rule.keeps_apart else None
        found = part(x, start_flow(x, torch.tensor(padding), documents))

        def see(b: int, s: int, j: int) -> bool:
            return bool(padding[b][j]) and may(rule, s, j, DOCUMENTS[b])

        expected = by_hand(part, x, x, see)
        real = torch.tensor(padding).bool()
        assert torch.isfinite(found).all()
        assert_same_with_gradients(part, x, found[real], expected[real])

    def test_without_documents(self, heads: int, groups: int, rule: Rule) -> None:
        part = drawn(attention(heads, groups, rule).build())
        x = x_of(2, 5, WIDTH)
        expected = by_hand(part, x, x, lambda b, s, j: may(rule, s, j, None))
        assert_same_with_gradients(part, x, part(x, start_flow(x)), expected)

    def test_one_token(self, heads: int, groups: int, rule: Rule) -> None:
        part = drawn(attention(heads, groups, rule).build())
        x = x_of(2, 1, WIDTH)
        expected = by_hand(part, x, x, lambda b, s, j: True)
        assert_same_with_gradients(part, x, part(x, start_flow(x)), expected)

    def test_weights_are_what_was_used(self, heads: int, groups: int, rule: Rule) -> None:
        part = drawn(attention(heads, groups, rule).build())
        x = x_of(3, 5, WIDTH)
        flow = start_flow(x, torch.tensor(PADDINGS["left"]), torch.tensor(DOCUMENTS) if rule.keeps_apart else None)
        flow.trace = Trace()
        out = part(x, flow)
        (weights,) = flow.trace.attention.values()
        assert weights.shape == (3, heads, 5, 5)
        assert not weights.requires_grad
        values = cut(part, x, "v", groups).repeat_interleave(heads // groups, 1)
        mixed = (weights.double() @ values).transpose(1, 2).flatten(2)
        torch.testing.assert_close(mixed @ part.o.weight.T + part.o.bias, out, rtol=1e-5, atol=1e-5)
        sums = weights.sum(-1)
        assert ((sums - 1).abs() < 1e-5).logical_or(sums == 0).all()


@layouts
class TestNothingToLookAt:
    """A row without keys gives zeros, forwards and backwards."""

    @pytest.mark.parametrize("rule", [Everyone(), Causal(), SameDocument()], ids=["everyone", "causal", "documents"])
    def test_self_attention(self, heads: int, groups: int, rule: Rule) -> None:
        part = drawn(attention(heads, groups, rule).build())
        x = x_of(2, 4, WIDTH)
        valid = torch.tensor([[0, 0, 1, 1], [0, 0, 0, 0]])
        documents = torch.tensor([[0, 0, 1, 1], [0, 0, 0, 0]])
        out = part(x, start_flow(x, valid, documents if rule.keeps_apart else None))
        nothing = out[1] if rule == Everyone() else torch.cat((out[0, :2], out[1]))
        torch.testing.assert_close(nothing, part.o.bias.expand_as(nothing))
        (gradient,) = torch.autograd.grad(nothing.sum(), x)
        assert torch.equal(gradient, torch.zeros_like(x))

    def test_cross_attention(self, heads: int, groups: int) -> None:
        part = drawn(cross(heads, groups).build())
        x, memory = x_of(2, 3, WIDTH), x_of(2, 4, WIDTH)
        valid = torch.tensor([[1, 1, 0, 1], [0, 0, 0, 0]])
        out = part(x, with_memory(x, memory, valid))
        torch.testing.assert_close(out[1], part.o.bias.expand(3, -1))
        assert not torch.allclose(out[0], part.o.bias.expand(3, -1))
        for gradient in torch.autograd.grad(out.sum(), [x, memory]):
            assert torch.isfinite(gradient).all()
            assert torch.equal(gradient[1], torch.zeros_like(gradient[1]))

    def test_a_memory_without_rows(self, heads: int, groups: int) -> None:
        part = drawn(cross(heads, groups).build())
        x, memory = x_of(2, 3, WIDTH), x_of(2, 0, WIDTH)
        out = part(x, with_memory(x, memory, None))
        torch.testing.assert_close(out, part.o.bias.expand(2, 3, -1))


def with_memory(x: Tensor, memory: Tensor, valid: Tensor | None) -> Flow:
    flow = start_flow(x)
    real = None if valid is None else valid.bool()
    flow.memory, flow.memory_view = memory, View(x.shape[1], memory.shape[1], real, None, False, x.device)
    return flow


@layouts
class TestCrossAttention:
    def test_key_by_key(self, heads: int, groups: int) -> None:
        part = drawn(cross(heads, groups).build())
        x, memory = x_of(3, 2, WIDTH), x_of(3, 5, WIDTH)
        valid = torch.tensor(PADDINGS["holes and an empty row"])
        found = part(x, with_memory(x, memory, valid))
        expected = by_hand(part, x, memory, lambda b, s, j: bool(valid[b, j]))
        assert_same_with_gradients(part, x, found, expected)

    @pytest.mark.parametrize("cached", [False, True])
    def test_several_hypotheses_share_a_sentence(self, heads: int, groups: int, cached: bool) -> None:
        part = drawn(cross(heads, groups).build())
        x, memory = x_of(6, 4, WIDTH), x_of(2, 5, WIDTH)
        valid = torch.tensor([[1, 1, 1, 0, 0], [0, 1, 1, 1, 1]])
        flow = with_memory(x, memory, valid)
        flow.cache = GrowingCache() if cached else None
        repeated = with_memory(x, memory.repeat_interleave(3, 0), valid.repeat_interleave(3, 0))
        assert_same_with_gradients(part, x, part(x, flow), part(x, repeated))
        if cached:
            (keys, _), *_ = flow.cache._memory.values()
            assert keys.shape[0] == 2

    def test_the_memory_is_projected_once(self, heads: int, groups: int) -> None:
        part = drawn(cross(heads, groups).build())
        x, memory = x_of(2, 3, WIDTH), x_of(2, 5, WIDTH)
        first = with_memory(x, memory, None)
        first.cache = GrowingCache()
        expected = part(x, first)
        second = with_memory(x, torch.full_like(memory, float("nan")), None)
        second.cache = first.cache
        torch.testing.assert_close(part(x, second), expected)

    def test_rows_that_can_not_share(self, heads: int, groups: int) -> None:
        part = drawn(cross(heads, groups).build())
        x, memory = x_of(3, 2, WIDTH), x_of(2, 5, WIDTH)
        with pytest.raises(SpecError, match="3 rows can't share the encoder's output of 2 sentences evenly"):
            part(x, with_memory(x, memory, None))

    def test_without_a_memory(self, heads: int, groups: int) -> None:
        x = x_of(1, 2, WIDTH)
        with pytest.raises(SpecError, match="cross-attention needs an encoder's output"):
            drawn(cross(heads, groups).build())(x, start_flow(x))


class TestKernel:
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        return x_of(2, 4, 3, 5), x_of(2, 2, 3, 5), x_of(2, 2, 3, 5)

    @pytest.mark.parametrize("scale", [None, 0.3, 2.0])
    def test_scale(self, scale: float | None) -> None:
        q, k, v = self.tensors()
        view = start_flow(q[:, 0]).view
        found = Softmax(scale).build().attend((q, k, v), Context(Everyone(), view))
        torch.testing.assert_close(found, attend(q, k, v, lambda *_: True, scale))

    @rules
    @pytest.mark.parametrize("padding", [[[1] * 3] * 2, [[0, 1, 1], [0, 0, 0]], [[1, 1, 0], [1, 1, 1]]])
    @pytest.mark.parametrize("shape", [(1, 4, 3, 3), (2, 4, 3, 3), (1, 1, 3, 3), (1, 4, 1, 3)])
    def test_a_score_bias(self, rule: Rule, padding: list[list[int]], shape: tuple[int, ...]) -> None:
        q, k, v = self.tensors()
        bias = x_of(*shape)
        documents = torch.tensor([[0, 1, 1], [0, 0, 1]])
        view = start_flow(q[:, 0], torch.tensor(padding), documents).view
        kernel = Softmax().build()
        found = kernel.attend((q, k, v), Context(rule, view, Plain(view, (bias,))))
        keys = k.repeat_interleave(2, 1)
        scores = q @ keys.transpose(-1, -2) / 5**0.5 + bias
        allowed = torch.tensor(
            [
                [[bool(padding[b][j]) and may(rule, s, j, documents[b].tolist()) for j in range(3)] for s in range(3)]
                for b in range(2)
            ]
        )[:, None]
        weights = torch.softmax(scores.masked_fill(~allowed, float("-inf")), -1).nan_to_num(0)
        real = torch.tensor(padding).bool()[:, None, :, None].expand(2, 4, 3, 5)
        torch.testing.assert_close(found[real], (weights @ v.repeat_interleave(2, 1))[real])
        found.sum().backward()
        assert torch.isfinite(bias.grad).all()
        traced = kernel.weights(q, k, Context(rule, view, Plain(view, (bias,)))).double()
        torch.testing.assert_close(traced[real[..., :3]], weights[real[..., :3]], rtol=1e-5, atol=1e-5)

    def test_dropout_of_weights(self) -> None:
        q, k, v = x_of(1, 1, 1, 4), x_of(1, 1, 4000, 4) * 0, torch.ones(1, 1, 4000, 4, dtype=torch.float64)
        view = View(1, 4000, None, None, False, q.device)
        kernel = Softmax(dropout=0.5).build()
        dropped = float(kernel.train().attend((q, k, v), Context(Everyone(), view))[0, 0, 0, 0].detach())
        assert dropped != 1
        assert dropped == pytest.approx(1, abs=0.1)
        torch.testing.assert_close(kernel.eval().attend((q, k, v), Context(Everyone(), view)), torch.ones_like(q))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
    def test_half_width_inputs(self, dtype: torch.dtype) -> None:
        part = attention(4, 2, Causal()).build()
        x = torch.randn(2, 5, WIDTH)
        expected = part(x, start_flow(x))
        half = part.to(dtype)(x.to(dtype), start_flow(x))
        assert half.dtype == dtype
        torch.testing.assert_close(half.float(), expected, rtol=0.1, atol=0.05)
        with torch.autocast("cpu", torch.bfloat16):
            mixed = part.float()(x, start_flow(x))
        torch.testing.assert_close(mixed.float(), expected, rtol=0.1, atol=0.05)


class TestSlots:
    def test_traces_are_named_by_path(self) -> None:
        spec = Stack((attention(4, 4, Causal()), attention(4, 4, Causal())))
        x = torch.randn(1, 3, WIDTH)
        flow = start_flow(x)
        flow.trace, flow.path = Trace(), "decoder."
        spec.build()(x, flow)
        assert list(flow.trace.attention) == ["decoder.0.", "decoder.1."]
        assert flow.path == "decoder."

    def test_stacks_in_stacks_keep_apart(self) -> None:
        inner = Stack((attention(4, 4, Causal()),) * 2)
        part = Stack((inner, inner)).build().eval()
        x = torch.randn(1, 6, WIDTH)
        flow = start_flow(x)
        flow.trace = Trace()
        full = part(x, flow)
        assert len(flow.trace.attention) == 4
        cache, found = GrowingCache(), []
        for one in x.split(1, 1):
            found.append(part(one, start_flow(one, cache=cache)))
            cache.length += 1
        torch.testing.assert_close(torch.cat(found, 1), full)


class TestSizes:
    @pytest.mark.parametrize("kind", [Attention, CrossAttention])
    @pytest.mark.parametrize(("field", "width"), [("q", 6), ("k", 12), ("v", 3)])
    def test_projections_must_fit_the_heads(self, kind: type[Attention], field: str, width: int) -> None:
        fine = attention(6, 2, Everyone()) if kind is Attention else cross(6, 2)
        with pytest.raises(SpecError, match=rf"{field} gives {width} values, but"):
            fine.replace(**{field: Linear(WIDTH, width)})

    @pytest.mark.parametrize("kind", [Attention, CrossAttention])
    def test_the_output_must_take_all_heads(self, kind: type[Attention]) -> None:
        fine = attention(6, 2, Everyone()) if kind is Attention else cross(6, 2)
        with pytest.raises(SpecError, match="o takes 5 values, but"):
            fine.replace(o=Linear(5, WIDTH))
