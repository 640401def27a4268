"""Exact kernels against the dense computation of the same rule: answers, gradients, biases, dropout, odd lengths."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import polyformer.parts.kernels.tiled
from polyformer.errors import SpecError
from polyformer.parts import Alibi, Causal, Context, Kernel, Rule, SameDocument, Shaw, Sliding, Softmax, Tiled, Window
from polyformer.parts.flow import Flow, GrowingCache, start_flow
from polyformer.parts.rules import Everyone
from polyformer.parts.view import View
from tests.parts.test_places import BIASES, HEADS, E, rules, views

KERNELS: dict[str, Kernel] = {
    "tiled": Tiled(3, 2),
    "tiled in long blocks": Tiled(4, 5),
    "sliding": Sliding(2),
    "sliding row by row": Sliding(1),
}
kernels = pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS.keys())
RULES: dict[str, Rule] = {
    "everyone": Everyone(),
    "causal": Causal(),
    "documents": Causal() & SameDocument(),
    "causal window": Causal() & Window(3),
    "dilated": Causal() & Window(3, 2),
    "of both sides": Window(2) & SameDocument(),
    "dilated to both sides": Window(2, 3),
}


def draw(queries: int, keys: int, heads: int = HEADS, groups: int = HEADS, batch: int = 3) -> list[Tensor]:
    shapes = ((batch, heads, queries, E), *((batch, groups, keys, E),) * 2)
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


def assert_dense(kernel: Kernel, rule: Rule, view: View, qkv: list[Tensor], bias: Any = None) -> None:
    """Compare with `Softmax`: answers, and gradients of all that is behind them; with a window where one is needed."""
    rule = rule & Window(3) if kernel.unable(rule) else rule
    fields = {name: getattr(kernel, name) for name in ("scale", "dropout")}
    found, wanted = (
        cast(Any, spec.build()).attend(qkv, Context(rule, view, bias)) for spec in (kernel, Softmax(**fields))
    )
    real = torch.ones(found.shape[0], found.shape[2], dtype=torch.bool)
    if view.valid is not None:  # a padded query may see what it likes
        real = view.valid[:, view.keys - view.queries :].expand_as(real)
    found, wanted = (one.transpose(1, 2)[real] for one in (found, wanted))
    torch.testing.assert_close(found, wanted)
    sources = [] if bias is None else [one for one in bias.sources if one.requires_grad]
    toward, trained = torch.randn_like(wanted), [*qkv, *sources]
    for one, other in zip(
        torch.autograd.grad((found * toward).sum(), trained, allow_unused=True, retain_graph=True),
        torch.autograd.grad((wanted * toward).sum(), trained, allow_unused=True, retain_graph=True),
        strict=True,
    ):
        torch.testing.assert_close(one, other)


@kernels
@given(rule=rules(), view=views(), shared=st.sampled_from([1, 2, 4]))
def test_any_rule_and_any_padding(kernel: Kernel, rule: Rule, view: View, shared: int) -> None:
    assert_dense(kernel, rule, view, draw(view.queries, view.keys, 4, 4 // shared))


@kernels
@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("length", [0, 1, 2, 5, 13, 24])
def test_any_length(kernel: Kernel, name: str, length: int) -> None:
    """Shorter than a window or a block, and not a multiple of either."""
    assert_dense(kernel, RULES[name], start_flow(torch.zeros(3, length)).view, draw(length, length))


@kernels
@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("queries", [1, 2, 5])
def test_few_queries_of_many_keys(kernel: Kernel, name: str, queries: int) -> None:
    view = start_flow(torch.zeros(3, queries), None, None, GrowingCache(length=40 - queries)).view
    assert_dense(kernel, RULES[name], view, draw(queries, 40))


@kernels
@pytest.mark.parametrize("layout", ["plain", "padded", "gaps", "packed", "cached"])
@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize("name", ["everyone", "documents", "causal window", "dilated"])
def test_any_bias(kernel: Kernel, name: str, bias: str, layout: str) -> None:
    torch.manual_seed(0)
    flow = laid_out(layout)
    part = cast(Any, BIASES[bias].build(dtype=torch.float64))
    for weight in part.parameters():
        torch.nn.init.normal_(weight)
    qkv = draw(flow.view.queries, flow.view.keys)
    assert_dense(kernel, RULES[name], flow.view, qkv, part.bias(qkv[0], flow))


def laid_out(layout: str) -> Flow:
    """Return a flow of three sequences of 13 tokens."""
    valid, documents, past = None, None, 0
    if layout == "padded":
        valid = torch.ones(3, 13)
        valid[0, :4], valid[1, :9] = 0, 0
    elif layout == "gaps":
        valid = torch.ones(3, 13)
        valid[0, 2:6], valid[1, 7:9] = 0, 0
    elif layout == "packed":
        documents = torch.tensor([[0] * 5 + [1] * 8, [3] * 13, [0] + [1] * 6 + [2] * 6])
    elif layout == "cached":
        past = 6
    return start_flow(torch.zeros(3, 13 - past), valid, documents, GrowingCache(length=past) if past else None)


@kernels
def test_nothing_to_look_at_gives_zeros(kernel: Kernel) -> None:
    for rule in RULES.values():
        valid = torch.tensor([[0] * 13, [0] * 12 + [1], [1] * 6 + [0] * 7])
        view = start_flow(torch.zeros(3, 13), valid).view
        qkv = draw(13, 13)
        found = cast(Any, kernel.build()).attend(qkv, Context(rule, view))
        assert (found[0] == 0).all()
        for gradient in torch.autograd.grad(found.square().sum(), qkv):
            assert gradient.isfinite().all()
            assert (gradient[0] == 0).all()


@kernels
def test_no_keys_at_all(kernel: Kernel) -> None:
    found = cast(Any, kernel.build()).attend(
        draw(5, 0), Context(Everyone(), View(5, 0, None, None, False, torch.device("cpu")))
    )
    assert found.equal(torch.zeros(3, HEADS, 5, E))


@kernels
def test_great_scores(kernel: Kernel) -> None:
    q, k, v = (one.detach() for one in draw(13, 13))
    view = start_flow(torch.zeros(3, 13)).view
    assert_dense(
        kernel, Causal() & Window(3), view, [(1e3 * q).requires_grad_(), k.requires_grad_(), v.requires_grad_()]
    )
    for factor in (1e4, -1e4):
        found = cast(Any, kernel.build()).attend((factor * q.abs(), k.abs(), v), Context(Causal() & Window(3), view))
        assert found.isfinite().all()


@kernels
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_half_precision(kernel: Kernel, dtype: torch.dtype) -> None:
    qkv = [one.detach().to(dtype).requires_grad_() for one in draw(13, 13)]
    view = start_flow(torch.zeros(3, 13)).view
    context = Context(Causal() & Window(3), view)
    found = cast(Any, kernel.build()).attend(qkv, context)
    assert found.dtype == dtype
    wanted = cast(Any, Softmax().build()).attend([one.double() for one in qkv], context)
    torch.testing.assert_close(found.double(), wanted, atol=2e-2, rtol=2e-2)
    assert all(one.dtype == dtype for one in torch.autograd.grad(found.sum(), qkv))


@kernels
def test_another_scale(kernel: Kernel) -> None:
    assert_dense(kernel.replace(scale=0.3), Causal() & Window(3), start_flow(torch.zeros(3, 13)).view, draw(13, 13))


@kernels
def test_the_weights_are_those_that_attend(kernel: Kernel) -> None:
    q, k, v = draw(13, 13, 4, 2)
    part, context = cast(Any, kernel.build()), Context(RULES["causal window"], start_flow(torch.zeros(3, 13)).view)
    mixed = part.weights(q, k, context) @ v.repeat_interleave(2, 1)
    torch.testing.assert_close(mixed, part.attend((q, k, v), context), rtol=1e-5, atol=1e-6)


class TestDropout:
    def part(self, kernel: Kernel, rate: float) -> Any:
        return cast(Any, kernel.replace(dropout=rate).build()).train()

    @kernels
    def test_weights_are_dropped_in_training_only(self, kernel: Kernel) -> None:
        view, q = start_flow(torch.zeros(3, 400)).view, torch.zeros(3, HEADS, 400, E)
        part, context = self.part(kernel, 0.5), Context(Window(100), view)
        ones = torch.ones_like(q)
        found = part.attend((q, q, ones), context)
        assert found.std() > 0.01
        assert float(found.mean()) == pytest.approx(1, abs=0.01)
        torch.testing.assert_close(part.eval().attend((q, q, ones), context), ones)

    @kernels
    @pytest.mark.parametrize("name", ["documents", "causal window", "dilated to both sides"])
    def test_the_backward_pass_drops_the_same(self, kernel: Kernel, name: str) -> None:
        """The slope along a line is that of the answers with the same seed."""
        view, qkv = start_flow(torch.zeros(3, 13)).view, draw(13, 13)
        part, context = self.part(kernel, 0.3), Context(Window(4) & RULES[name], view)
        lines, toward = [torch.randn_like(one) for one in qkv], torch.randn(3, HEADS, 13, E, dtype=torch.float64)

        def along(step: float) -> Tensor:
            torch.manual_seed(5)
            moved = [one + step * line for one, line in zip(qkv, lines, strict=True)]
            return (part.attend(moved, context) * toward).sum()

        slopes = torch.autograd.grad(along(0.0), qkv)
        slope = sum((one * line).sum() for one, line in zip(slopes, lines, strict=True))
        torch.testing.assert_close(slope, (along(1e-6) - along(-1e-6)) / 2e-6, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("room", [1, 4 * 6, 10**6], ids=["heads", "rows", "all"])
@pytest.mark.parametrize("groups", [4, 2, 1])
@pytest.mark.parametrize("layout", ["plain", "padded", "packed"])
def test_heads_that_take_turns(monkeypatch: pytest.MonkeyPatch, room: int, groups: int, layout: str) -> None:
    monkeypatch.setattr(polyformer.parts.kernels.tiled, "ROOM", room)
    flow, qkv = laid_out(layout), draw(13, 13, 4, groups)
    part = cast(Any, Shaw(E, 3).build(dtype=torch.float64))
    for bias in (None, part.bias(qkv[0], flow), Alibi(4).build().bias(qkv[0], flow)):  # type: ignore[operator]
        assert_dense(Tiled(3, 8), Causal() & SameDocument(), flow.view, qkv, bias)


@pytest.mark.parametrize("fields", [{"keys": 0}, {"rows": 0}])
def test_refused_tiles(fields: dict[str, int]) -> None:
    with pytest.raises(SpecError, match="keys and rows must be at least 1"):
        Tiled(**fields)


def test_refused_strips() -> None:
    with pytest.raises(SpecError, match="block must be at least 1, not 0"):
        Sliding(0)
    assert Sliding().unable(Causal() & SameDocument()) == "no Window in it says how far to look"
    assert not Sliding().unable(Causal() & Window(3, 2))


@pytest.mark.parametrize("kernel", [Tiled(), Sliding()], ids=["tiled", "sliding"])
def test_refused_dropout(kernel: Kernel) -> None:
    with pytest.raises(SpecError, match=r"dropout must be in \[0, 1\), not 1.0"):
        kernel.replace(dropout=1.0)
