"""Residual's slots in their order, and the placements they make."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from polyformer.errors import SpecError
from polyformer.parts import Chain, LayerNorm, Linear, Residual, RMSNorm, Stack
from polyformer.parts.flow import start_flow
from tests.parts.models import WIDTH, post, pre, sandwich


def run(spec: Residual | Chain | Stack, x: Tensor) -> tuple[Tensor, torch.nn.Module]:
    part = spec.build(dtype=torch.float64)
    for weight in part.parameters():
        torch.nn.init.normal_(weight)
    return part(x, start_flow(x)), part


@pytest.mark.parametrize("filled", list(itertools.product([False, True], repeat=3)))
def test_slots(filled: tuple[bool, bool, bool]) -> None:
    """x -> after(x + post(op(pre(x)))), with any of the three filled; matrices don't commute, so order shows."""
    x = torch.randn(2, 3, 4, dtype=torch.float64)
    slots = {name: Linear(4, 4) for name, there in zip(("pre", "post", "after"), filled, strict=True) if there}
    out, part = run(Residual(Linear(4, 4), **slots), x)

    def slot(name: str, y: Tensor) -> Tensor:
        one = getattr(part, name)
        return y if one is None else y @ one.weight.T + one.bias

    torch.testing.assert_close(out, slot("after", x + slot("post", slot("op", slot("pre", x)))))


def test_post_norm_is_the_papers_add_and_norm() -> None:
    x = torch.randn(2, 3, WIDTH, dtype=torch.float64)
    out, part = run(post(Linear(WIDTH, WIDTH)), x)
    expected = F.layer_norm(x + part.op(x), (WIDTH,), part.after.weight, part.after.bias)
    torch.testing.assert_close(out, expected)


def test_pre_norm_leaves_the_stream_alone() -> None:
    x = torch.randn(2, 3, WIDTH, dtype=torch.float64)
    out, part = run(pre(Linear(WIDTH, WIDTH)), x)
    expected = x + part.op(F.layer_norm(x, (WIDTH,), part.pre.weight, part.pre.bias))
    torch.testing.assert_close(out, expected)


def test_sandwich_norms_on_either_side() -> None:
    x = torch.randn(2, 3, WIDTH, dtype=torch.float64)
    out, part = run(sandwich(Linear(WIDTH, WIDTH)), x)
    inner = part.op(F.rms_norm(x, (WIDTH,), part.pre.weight, 1e-5))
    torch.testing.assert_close(out, x + F.rms_norm(inner, (WIDTH,), part.post.weight, 1e-5))
    assert type(part.pre.spec) is type(part.post.spec) is RMSNorm


def test_chains_and_stacks_go_in_order() -> None:
    x = torch.randn(2, 3, 4, dtype=torch.float64)
    out, part = run(Chain((Linear(4, 5), Linear(5, 3))), x)
    torch.testing.assert_close(out, part.steps[1](part.steps[0](x)))
    out, part = run(Stack((Linear(4, 5), Linear(5, 3)), LayerNorm(3)), x)
    expected = F.layer_norm(part.blocks[1](part.blocks[0](x)), (3,), part.norm.weight, part.norm.bias)
    torch.testing.assert_close(out, expected)


def test_an_empty_stack_is_its_norm_and_an_empty_chain_is_none() -> None:
    x = torch.randn(2, 3, 4, dtype=torch.float64)
    assert run(Stack(()), x)[0] is x
    with pytest.raises(SpecError, match="Chain: needs at least one step"):
        Chain(())
