"""The attention-free kernel by its formula, at extremes, and that its cost is linear."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from polyformer.errors import SpecError
from polyformer.parts import AttentionFree, Causal, Context, Everyone, Rule, SameDocument, Window
from polyformer.parts.view import View
from tests.parts.linear import forward_and_back, growth

RULES = {"everyone": Everyone(), "causal": Causal(), "documents": SameDocument(), "both": Causal() & SameDocument()}


def view_of(keys: int, valid: Tensor | None = None, documents: Tensor | None = None) -> View:
    return View(keys, keys, valid, documents, False, torch.device("cpu"))


def draw(keys: int, groups: int = 2, size: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    shapes = ((2, 4, keys, 3), (2, groups, keys, 3), (2, groups, keys, 3))
    q, k, v = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes)
    return q, (k * size).detach().requires_grad_(), v


def by_formula(qkv: tuple[Tensor, Tensor, Tensor], rule: Rule, view: View) -> Tensor:
    """All pairs of rows, for every element of a head."""
    q, k, v = qkv
    ruled = rule.allowed(view)
    allowed = torch.ones(1, view.queries, view.keys, dtype=torch.bool) if ruled is None else ruled
    allowed = allowed if view.valid is None else allowed & view.valid[:, None]
    scores = k[:, :, None].expand(-1, -1, k.shape[2], -1, -1).masked_fill(~allowed[:, None, :, :, None], -torch.inf)
    shared = (scores.softmax(3).nan_to_num(0.0) * v[:, :, None]).sum(3)
    return torch.sigmoid(q) * shared.repeat_interleave(q.shape[1] // k.shape[1], 1)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_by_the_formula(rule: str, groups: int) -> None:
    documents = torch.tensor([[0] * 4 + [1] * 5 + [2] * 2] * 2) if rule in ("documents", "both") else None
    view, qkv = view_of(11, documents=documents), draw(11, groups)
    part: Any = AttentionFree(3).build()
    found, wanted = part.attend(qkv, Context(RULES[rule], view)), by_formula(qkv, RULES[rule], view)
    torch.testing.assert_close(found, wanted)
    towards = torch.randn_like(found)
    for one, other in zip(*(torch.autograd.grad((x * towards).sum(), qkv) for x in (found, wanted)), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("rule", ["everyone", "causal"])
def test_padding_and_rows_that_see_nothing(rule: str) -> None:
    valid = torch.tensor([[False, True, True, False, True], [False] * 5])
    view, qkv = view_of(5, valid), draw(5)
    found = AttentionFree(2).build().attend(qkv, Context(RULES[rule], view))
    torch.testing.assert_close(found, by_formula(qkv, RULES[rule], view))
    assert (found[1] == 0).all()


def test_large_keys_do_not_overflow() -> None:
    view, qkv = view_of(40), draw(40, size=300.0)
    part, context = AttentionFree().build(), Context(Causal(), view)
    single = tuple(one.detach().float() for one in qkv)
    torch.testing.assert_close(
        part.attend(single, context).double(), by_formula(qkv, Causal(), view), atol=1e-3, rtol=1e-3
    )


def test_no_rows_and_one() -> None:
    part, q, k, v = AttentionFree().build(), *draw(1, 4)
    torch.testing.assert_close(part.attend((q, k, v), Context(Causal(), view_of(1))), torch.sigmoid(q) * v)
    assert part.attend(draw(0), Context(Causal(), view_of(0))).shape == (2, 4, 0, 3)


def test_cost_is_linear() -> None:
    def run(n: int) -> None:
        context = Context(Causal(), view_of(n))
        forward_and_back(lambda *qkv: AttentionFree().build().attend(qkv, context), *torch.randn(3, 1, 2, n, 4))

    largest, all_together = growth(run, 256)
    assert largest <= 2
    assert all_together <= 2.05


def test_refused() -> None:
    with pytest.raises(SpecError, match="chunk must be at least 1, not 0"):
        AttentionFree(0)
    with pytest.raises(SpecError, match="AttentionFree can't honour the rule Window"):
        AttentionFree().build().attend(draw(3), Context(Window(2), view_of(3)))
    with pytest.raises(SpecError, match="a head has no attention weights to show"):
        AttentionFree().build().weights(*draw(3)[:2], Context(Everyone(), view_of(3)))
