"""Bounded scores by Gemma 2's equation, under every rule."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from torch import Tensor

from polyformer.errors import SpecError
from polyformer.parts import Capped, Causal, Context, Rule, SameDocument, Softmax, Window
from polyformer.parts.rules import Everyone
from polyformer.parts.view import View
from tests.parts.reference import Plain


def view_of(queries: int, keys: int, valid: Tensor | None = None, documents: Tensor | None = None) -> View:
    return View(queries, keys, valid, documents, False, torch.device("cpu"))


def draw(heads: int, groups: int, queries: int, keys: int) -> tuple[Tensor, Tensor, Tensor]:
    kinds = {"dtype": torch.float64, "requires_grad": True}
    shapes = ((2, heads, queries, 4), (2, groups, keys, 4), (2, groups, keys, 4))
    q, k, v = (torch.randn(shape, **kinds) for shape in shapes)  # type: ignore[call-overload]
    return q, k, v


def by_equation(
    spec: Capped, qkv: tuple[Tensor, Tensor, Tensor], allowed: Tensor, bias: Tensor | None = None
) -> Tensor:
    """Section 2 of the report: cap · tanh(score / cap), then what any attention does."""
    q, k, v = qkv
    several = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(several, 1), v.repeat_interleave(several, 1)
    scale = 4**-0.5 if spec.scale is None else spec.scale
    scores = spec.cap * torch.tanh(q @ k.mT * scale / spec.cap) + (0 if bias is None else bias)
    weights = scores.masked_fill(~allowed, -torch.inf).softmax(-1)
    return weights.nan_to_num(0.0) @ v


RULES: dict[str, Rule] = {
    "causal": Causal(),
    "window": Causal() & Window(2),
    "documents": Causal() & SameDocument(),
    "everyone": Everyone(),
}


@pytest.mark.parametrize("scale", [None, 0.9])
@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (4, 2), (4, 1)])
@pytest.mark.parametrize("name", RULES)
def test_the_equation(name: str, heads: int, groups: int, scale: float | None) -> None:
    spec, qkv = Capped(1.5, scale), draw(heads, groups, 3, 5)
    documents = torch.tensor([[0, 0, 0, 1, 1], [0, 1, 1, 1, 1]]) if name == "documents" else None
    valid = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]]).bool()
    view = view_of(3, 5, valid, documents)
    rule = RULES[name].allowed(view)
    allowed = valid[:, None, None] if rule is None else rule[:, None] & valid[:, None, None]
    part = cast(Any, spec.build())
    found, expected = part.attend(qkv, Context(RULES[name], view)), by_equation(spec, qkv, allowed)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
    toward = torch.randn_like(found)
    for one, other in zip(
        torch.autograd.grad((found * toward).sum(), qkv),
        torch.autograd.grad((expected * toward).sum(), qkv),
        strict=True,
    ):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_a_bias_is_added_behind_the_bound() -> None:
    spec, qkv, bias = Capped(0.5), draw(2, 2, 4, 4), 10 * torch.randn(1, 2, 4, 4)
    part = cast(Any, spec.build())
    view = view_of(4, 4)
    found = part.attend(qkv, Context(Everyone(), view, Plain(view, (bias,))))
    torch.testing.assert_close(found, by_equation(spec, qkv, torch.tensor(True), bias), atol=1e-6, rtol=1e-5)


def test_a_high_bound_is_none() -> None:
    qkv, context = draw(4, 2, 3, 3), Context(Causal(), view_of(3, 3))
    capped, plain = (cast(Any, spec.build()) for spec in (Capped(1e6), Softmax()))
    torch.testing.assert_close(capped.attend(qkv, context), plain.attend(qkv, context), atol=1e-6, rtol=1e-5)


def test_the_weights_are_those_that_attend() -> None:
    q, k, v = draw(4, 2, 3, 5)
    part, context = cast(Any, Capped(2.0).build()), Context(Causal(), view_of(3, 5))
    weights = part.weights(q, k, context)
    assert weights.shape == (2, 4, 3, 5)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, 3, dtype=weights.dtype))
    mixed = weights.double() @ v.repeat_interleave(2, 1)
    torch.testing.assert_close(mixed, part.attend((q, k, v), context), atol=1e-6, rtol=1e-5)


def test_nothing_to_look_at_gives_zeros() -> None:
    view = view_of(2, 3, torch.tensor([[True, True, True], [False, False, False]]))
    found = cast(Any, Capped(2.0).build()).attend(draw(2, 1, 2, 3), Context(Causal(), view))
    assert found.isfinite().all()
    assert (found[1] == 0).all()
    assert (found[0] != 0).any()


def test_weights_are_dropped_in_training_only() -> None:
    part, qkv = cast(Any, Capped(2.0, dropout=0.5).build()), draw(2, 2, 4, 4)
    context = Context(Everyone(), view_of(4, 4))
    assert part.eval().attend(qkv, context).equal(part.attend(qkv, context))
    assert not part.train().attend(qkv, context).equal(part.attend(qkv, context))


@pytest.mark.parametrize(
    ("keys", "told"), [({"cap": 0.0}, "cap must be positive"), ({"cap": 1.0, "dropout": 1.0}, "dropout")]
)
def test_refused(keys: dict[str, float], told: str) -> None:
    with pytest.raises(SpecError, match=told):
        Capped(**keys)
