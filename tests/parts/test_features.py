"""Linear attention and Performers by their papers' formulas, worked out densely; and that they are what they say."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from polyformer.errors import SpecError
from polyformer.parts import (
    Capped,
    Causal,
    Context,
    Everyone,
    Kernel,
    LinearAttention,
    Performer,
    SameDocument,
    Softmax,
)
from polyformer.parts.kernels import sums
from polyformer.parts.kernels.features import redraw
from polyformer.parts.rules import Rule
from polyformer.parts.view import View
from tests.parts.linear import forward_and_back, growth
from tests.parts.models import assert_same

WIDTH = 4
Triple = tuple[Tensor, Tensor, Tensor]

KINDS: dict[str, Callable[[int], Kernel]] = {
    "linear": lambda chunk: LinearAttention(chunk),
    "exp": lambda chunk: Performer(WIDTH, 6, chunk=chunk),
    "exp-scaled": lambda chunk: Performer(WIDTH, 6, scale=1.0, chunk=chunk),
    "relu": lambda chunk: Performer(WIDTH, 6, "relu", chunk=chunk),
    "sigmoid": lambda chunk: Performer(WIDTH, 6, "sigmoid", chunk=chunk),
    "abs": lambda chunk: Performer(WIDTH, 6, "abs", chunk=chunk),
}
kinds = pytest.mark.parametrize("kind", KINDS)


def build(kernel: Kernel, dtype: torch.dtype = torch.float64) -> Any:
    torch.manual_seed(2)
    return kernel.build(dtype=dtype)


def draw(heads: int, groups: int, queries: int, keys: int, batch: int = 2) -> Triple:
    shapes = ((batch, heads, queries, WIDTH), (batch, groups, keys, WIDTH), (batch, groups, keys, 3))
    q, k, v = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes)
    return q, k, v


def view_of(queries: int, keys: int, valid: Tensor | None = None, documents: Tensor | None = None) -> View:
    return View(queries, keys, valid, documents, False, torch.device("cpu"))


def features(part: Any, x: Tensor) -> Tensor:
    """φ as the papers write it."""
    spec = part.spec
    if isinstance(spec, LinearAttention):
        return torch.where(x > 0, x + 1, x.exp())
    x = x * (x.shape[-1] ** -0.25 if spec.scale is None else spec.scale**0.5)
    w = torch.einsum("...e,fe->...f", x, part.projection)
    if spec.function == "exp":
        return (w - (x * x).sum(-1, keepdim=True) / 2).exp()
    return {"relu": w.clamp(min=0), "sigmoid": 1 / (1 + (-w).exp()), "abs": w.abs()}[spec.function] + 0.001


def by_formula(part: Any, qkv: Triple, context: Context) -> Tensor:
    """Every pair of query and key."""
    q, k, v = qkv
    several = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(several, 1), v.repeat_interleave(several, 1)
    scores = features(part, q) @ features(part, k).mT
    allowed, valid = context.rule.allowed(context.view), context.view.valid
    if allowed is not None:
        scores = scores * allowed[:, None]
    if valid is not None:
        scores = scores * valid[:, None, None]
    return (scores / scores.sum(-1, keepdim=True)).nan_to_num(0.0) @ v


def assert_formula(part: Any, qkv: Triple, context: Context) -> None:
    """Compare answers and gradients."""
    found, expected = part.attend(qkv, context), by_formula(part, qkv, context)
    torch.testing.assert_close(found, expected)
    toward = torch.randn_like(found)
    asked = [torch.autograd.grad((one * toward).nan_to_num(0.0).sum(), qkv) for one in (found, expected)]
    assert_same(*({name: one.nan_to_num(0.0) for name, one in zip("qkv", grads, strict=True)} for grads in asked))


RULES: dict[str, Rule] = {
    "everyone": Everyone(),
    "causal": Causal(),
    "documents": SameDocument(),
    "causal documents": Causal() & SameDocument(),
}


@kinds
@pytest.mark.parametrize("rule", RULES)
class TestFormula:
    @pytest.mark.parametrize("chunk", [1, 3, 64])
    @pytest.mark.parametrize("span", [1, sums.SPAN])
    def test_answers_and_gradients(
        self, kind: str, rule: str, chunk: int, span: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(sums, "SPAN", span)
        documents = torch.tensor([[0] * 5 + [1] * 2 + [2] * 4, [3] * 3 + [0] + [1] * 7]) if "doc" in rule else None
        context = Context(RULES[rule], view_of(11, 11, None, documents))
        for heads, groups in ((2, 2), (4, 2), (4, 1)):
            assert_formula(build(KINDS[kind](chunk)), draw(heads, groups, 11, 11), context)

    @pytest.mark.parametrize("chunk", [2, 64])
    @pytest.mark.parametrize("span", [1, sums.SPAN])
    def test_padding(self, kind: str, rule: str, chunk: int, span: int, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(sums, "SPAN", span)
        valid = torch.ones(3, 7).bool()
        valid[0, 5:] = valid[1, :3] = False
        valid[2] = torch.tensor([0, 1, 1, 0, 0, 1, 0])
        documents = torch.tensor([[0, 0, 0, 1, 1, 7, 0], [0, 5, 1, 1, 1, 2, 2], [9, 3, 3, 3, 9, 4, 3]])
        context = Context(RULES[rule], view_of(7, 7, valid, documents if "doc" in rule else None))
        real = valid[:, None, :, None]
        part, qkv = build(KINDS[kind](chunk)), draw(2, 1, 7, 7, batch=3)
        torch.testing.assert_close(part.attend(qkv, context) * real, by_formula(part, qkv, context) * real)

    def test_one_row_and_none(self, kind: str, rule: str) -> None:
        part = build(KINDS[kind](4))
        qkv = draw(2, 2, 1, 1)
        torch.testing.assert_close(part.attend(qkv, Context(RULES[rule], view_of(1, 1))), qkv[2])
        assert part.attend(draw(2, 1, 0, 0), Context(RULES[rule], view_of(0, 0))).shape == (2, 2, 0, 3)


@kinds
def test_queries_of_another_text(kind: str) -> None:
    part = build(KINDS[kind](4))
    valid = torch.tensor([[1, 1, 1, 1, 1], [0, 1, 1, 0, 0]]).bool()
    assert_formula(part, draw(4, 2, 3, 5), Context(Everyone(), view_of(3, 5, valid)))
    assert (part.attend(draw(4, 2, 3, 0), Context(Everyone(), view_of(3, 0))) == 0).all()


@kinds
def test_nothing_to_look_at_gives_zeros(kind: str) -> None:
    valid = torch.tensor([[False, False, True], [False, False, False]])
    for rule in (Everyone(), Causal()):
        found = build(KINDS[kind](2)).attend(draw(2, 1, 3, 3), Context(rule, view_of(3, 3, valid)))
        assert found.isfinite().all()
        assert (found[1] == 0).all()
        assert (found[0, :, 2] != 0).all()
        assert rule == Everyone() or (found[0, :, :2] == 0).all()


@kinds
@pytest.mark.parametrize("rule", [Everyone(), Causal()], ids=["everyone", "causal"])
def test_half_precision_is_summed_in_single(kind: str, rule: Rule) -> None:
    part, context = build(KINDS[kind](16)), Context(rule, view_of(300, 300))
    halves = tuple(one.detach().bfloat16() for one in draw(2, 1, 300, 300))
    expected = part.attend(tuple(one.double() for one in halves), context)
    part = part.to(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found = part.attend(halves, context)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), expected, atol=4e-3, rtol=8e-3)


@kinds
@pytest.mark.parametrize("rule", ["everyone", "causal", "causal documents"])
@pytest.mark.parametrize("span", [1024, sums.SPAN])
def test_cost_is_linear(kind: str, rule: str, span: int, monkeypatch: pytest.MonkeyPatch) -> None:
    part = build(KINDS[kind](16))

    def run(n: int) -> None:
        documents = torch.arange(n)[None] // 10 if "doc" in rule else None
        context = Context(RULES[rule], view_of(n, n, None, documents))
        forward_and_back(lambda *qkv: part.attend(qkv, context), *draw(2, 1, n, n, batch=1))

    monkeypatch.setattr(sums, "SPAN", span)
    largest, all_together = growth(run, 256)
    assert largest <= 2
    assert all_together <= 2.02


def test_a_quadratic_cost_would_be_seen() -> None:
    part = build(Capped(5.0))

    def run(n: int) -> None:
        forward_and_back(
            lambda *qkv: part.attend(qkv, Context(Everyone(), view_of(n, n))), *(torch.randn(1, 2, n, 4),) * 3
        )

    assert min(growth(run, 256)) > 3.5


class TestRandomFeatures:
    def test_softmax_is_estimated_the_better_the_more_there_are(self) -> None:
        torch.manual_seed(0)
        q, k, v = (0.7 * torch.randn(1, 2, 20, 8, dtype=torch.float64) for _ in range(3))
        context = Context(Causal(), view_of(20, 20))
        exact = build(Softmax()).attend((q, k, v), context)
        errors = [
            float((build(Performer(8, count)).attend((q, k, v), context) - exact).abs().mean())
            for count in (16, 512, 16384)
        ]
        assert errors[0] > 2 * errors[1] > 5 * errors[2]
        assert errors[2] < 0.02

    def test_they_are_orthogonal_and_as_long_as_gaussian_ones(self) -> None:
        part = build(Performer(16, 3000))
        blocks = part.projection[:2992].view(-1, 16, 16)
        lengths = blocks.norm(dim=-1, keepdim=True)
        for block in (blocks / lengths)[::40]:
            torch.testing.assert_close(block @ block.T, torch.eye(16, dtype=torch.float64), atol=1e-6, rtol=0)
        assert abs(float(lengths.square().mean()) - 16) < 0.5
        assert float(lengths.std()) > 0.5
        assert float(part.projection.mean(0).abs().max()) < 0.1

    def test_they_are_drawn_anew_on_request(self) -> None:
        part, context = build(Performer(WIDTH, 6)), Context(Everyone(), view_of(5, 5))
        qkv = draw(2, 2, 5, 5)
        first = part.attend(qkv, context)
        assert torch.equal(part.attend(qkv, context), first)
        part.redraw(torch.Generator().manual_seed(5))
        second = part.attend(qkv, context)
        assert not torch.allclose(first, second)
        other = build(Performer(WIDTH, 6))
        other.load_state_dict(part.state_dict())
        assert torch.equal(other.attend(qkv, context), second)
        other.redraw(torch.Generator().manual_seed(5))
        assert torch.equal(other.projection, part.projection)

    def test_whose_turn_it_is(self) -> None:
        both = torch.nn.ModuleList(Performer(WIDTH, 6, redraw_every=every).build() for every in (0, 4))
        before = [part.projection.clone() for part in both]
        for steps, changed in ((3, False), (8, True)):
            redraw(both, steps)
            found = [not torch.equal(part.projection, old) for part, old in zip(both, before, strict=True)]
            assert found == [False, changed]

    @pytest.mark.parametrize("rule", [Everyone(), Causal()], ids=["everyone", "causal"])
    @pytest.mark.parametrize("size", [10.0, 30.0])
    def test_large_queries_and_keys_do_not_overflow(self, rule: Rule, size: float) -> None:
        q, k, v = draw(2, 2, 50, 50)
        with torch.no_grad():
            k[:, :, 0] *= size  # so that the others' features are e^100 and more times larger
            q *= 3
        context = Context(rule, view_of(50, 50))
        wide = build(Performer(WIDTH, 32, chunk=8))
        narrow = build(Performer(WIDTH, 32, chunk=8), torch.float32)
        single = tuple(one.detach().float().requires_grad_() for one in (q, k, v))
        found = narrow.attend(single, context)
        torch.testing.assert_close(found.double(), wide.attend((q, k, v), context), atol=1e-3, rtol=1e-3)
        assert all(one.isfinite().all() for one in torch.autograd.grad(found.square().sum(), single))
        if rule == Causal():
            torch.testing.assert_close(found[:, :, 0].double(), v[:, :, 0], atol=1e-5, rtol=1e-5)

    def test_heads_of_another_width_are_refused(self) -> None:
        with pytest.raises(SpecError, match="this Performer's random features are for heads 8 wide, not 4"):
            build(Performer(8)).attend(draw(2, 2, 3, 3), Context(Everyone(), view_of(3, 3)))


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: Performer(0), "width, features and chunk must be at least 1"),
        (lambda: Performer(4, 0), "width, features and chunk must be at least 1"),
        (lambda: Performer(4, scale=0.0), "scale must be positive, not 0.0"),
        (lambda: Performer(4, redraw_every=-1), "redraw_every can't be negative; 0 means never"),
        (lambda: Performer(4, function="cos"), "function should be one of"),
        (lambda: LinearAttention(0), "chunk must be at least 1, not 0"),
    ],
)
def test_refused(make: Callable[[], Kernel], told: str) -> None:
    with pytest.raises(SpecError, match=told):
        make()
