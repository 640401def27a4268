"""Reversible layers: the formula, gradients against autograd's, and what is kept for them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from polyformer.errors import SpecError
from polyformer.parts import (
    Attention,
    BatchNorm,
    Buckets,
    Causal,
    Chain,
    Coupling,
    CrossAttention,
    Dropout,
    Experts,
    FeedForward,
    LayerNorm,
    Linear,
    Reversible,
    Trace,
)
from polyformer.parts.flow import Flow, start_flow
from polyformer.parts.reversible import ReversiblePart
from polyformer.parts.view import View
from polyformer.spec import Spec
from tests.parts.kept import kept_by_autograd
from tests.spec.trees import WIDTH, coupling


def built(*blocks: Coupling, norm: Spec | None = None) -> ReversiblePart:
    part = Reversible(blocks, norm).build(dtype=torch.float64)
    assert isinstance(part, ReversiblePart)
    with torch.no_grad():
        for weight in part.parameters():
            weight.add_(0.2 * torch.randn_like(weight))
    return part


def rows(batch: int = 3, length: int = 5) -> Tensor:
    return torch.randn(batch, length, WIDTH, dtype=torch.float64, requires_grad=True)


def with_memory(x: Tensor, memory: Tensor) -> Flow:
    valid = torch.tensor([[1] * 5, [1, 1, 0, 0, 0], [1] * 5])[: len(x), : x.shape[1]]
    flow = start_flow(x, valid)
    flow.memory, flow.memory_view = memory, View(x.shape[1], memory.shape[1], None, None, False, x.device)
    return flow


def gradients(part: ReversiblePart, x: Tensor, memory: Tensor, plain: bool) -> list[Tensor]:
    """Return the answer and the gradients of rows, the encoder's output and all weights."""
    torch.manual_seed(3)
    flow = with_memory(x, memory)
    if plain:
        out = part.plainly(x, flow)
        out = out if part.norm is None else part.norm(out, flow)
    else:
        out = part(x, flow)
        assert type(out.grad_fn).__name__ != "NoneType"
    loss = (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)).sum()
    wanted = [x, memory, *part.parameters()]
    return [out.detach(), *torch.autograd.grad(loss, wanted, allow_unused=True, materialize_grads=True)]


def looking() -> Coupling:
    f = Chain((LayerNorm(WIDTH), CrossAttention.of_width(WIDTH, 2), Dropout(0.3)))
    return Coupling(f, FeedForward.gated(WIDTH, 12))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("norm", [None, LayerNorm(2 * WIDTH)])
@pytest.mark.parametrize("blocks", [(coupling(),), (coupling(), looking(), coupling())])
def test_gradients_are_those_of_the_plain_formula(
    blocks: tuple[Coupling, ...], norm: Spec | None, training: bool
) -> None:
    """With dropout, which has to drop the same again, padding, and a memory that gets a gradient."""
    part, x = built(*blocks, norm=norm).train(training), rows()
    memory = torch.randn(3, 4, WIDTH, dtype=torch.float64, requires_grad=True)
    for found, wanted in zip(gradients(part, x, memory, False), gradients(part, x, memory, True), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-11)


def test_dropout_does_drop() -> None:
    part, x = built(coupling()).train(), rows()
    assert not torch.equal(part(x, start_flow(x)), part(x, start_flow(x)))


def test_the_formula() -> None:
    part, x = built(coupling(), coupling()).eval(), rows()
    flow = start_flow(x)
    first = second = x
    for block in part.blocks:
        first = first + block.f(second, flow)
        second = second + block.g(first, flow)
    torch.testing.assert_close(part(x, flow), torch.cat((first, second), -1))
    with torch.no_grad():
        torch.testing.assert_close(part(x, flow), torch.cat((first, second), -1))


def test_a_bias_that_layers_share_gets_all_of_its_gradient() -> None:
    """Layers share what they make of a table in a pass, which the first pass makes without a graph."""
    attention = Attention.of_width(WIDTH, 2, Causal()).replace(position=Buckets(2, 8, 16))
    part, x = built(*(Coupling(attention, Linear(WIDTH, WIDTH)),) * 2), rows()
    part.blocks[1].f.position.weight = part.blocks[0].f.position.weight
    memory = torch.randn(3, 4, WIDTH, dtype=torch.float64, requires_grad=True)
    found, wanted = gradients(part, x, memory, False), gradients(part, x, memory, True)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)
    flow = start_flow(x)
    part(x, flow)
    assert not flow._made  # or a layer behind would take a bias without a graph


def test_the_flow_may_go_on_before_the_gradient_is_taken() -> None:
    part, x = built(coupling(), coupling()).eval(), rows()
    flow = start_flow(x)
    out = part(x, flow)
    flow.renew(2)
    flow.path = "elsewhere."
    (found,) = torch.autograd.grad(out.sum(), x)
    (wanted,) = torch.autograd.grad(part.plainly(x, start_flow(x)).sum(), x)
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize(("plain", "least", "most"), [(False, 1.0, 1.05), (True, 4.0, 7.0)])
def test_what_is_kept_does_not_grow_with_the_depth(plain: bool, least: float, most: float) -> None:
    peaks = []
    for layers in (2, 12):
        part, x = built(*(coupling(),) * layers).train(), rows(2, 64)
        with kept_by_autograd(part) as kept:
            flow = start_flow(x)
            out = part.plainly(x, flow) if plain else part(x, flow)
            out.sum().backward()
        peaks.append(kept.peak)
    assert least <= peaks[1] / peaks[0] <= most


def test_mixed_precision_is_mixed_again() -> None:
    """The backward pass stands outside of the autocast block, and weights get gradients in their own precision."""
    part = built(coupling(), coupling()).float().eval()
    x = torch.randn(2, 6, WIDTH, requires_grad=True)
    found = []
    for way in (part, part.plainly):
        with torch.autocast("cpu", torch.bfloat16):
            out = way(x, start_flow(x))
        found.append(torch.autograd.grad((out * torch.linspace(-1, 1, 16)).sum(), [x, *part.parameters()]))
    assert {one.dtype for one in found[0]} == {torch.float32}
    one, other = (torch.cat([gradient.flatten() for gradient in gradients]) for gradients in found)
    assert (one - other).norm() < 0.03 * other.norm()


def test_a_routing_keeps_its_gradient() -> None:
    experts = Experts.of(FeedForward.of_widths(WIDTH, 12), WIDTH, 3, 2)
    part, x = built(Coupling(Linear(WIDTH, WIDTH), experts)), rows()
    flow = start_flow(x)
    flow.trace = Trace(wants=frozenset(("routing",)))
    part(x, flow)
    (routing,) = flow.trace.routing.values()
    (slope,) = torch.autograd.grad(routing.balance(), part.blocks[0].g.router.weight)
    assert slope.abs().max() > 0


def test_frozen_weights_and_rows_that_need_no_gradient() -> None:
    part, x = built(coupling()).eval().requires_grad_(False), rows()
    memory = torch.zeros(3, 4, WIDTH, dtype=torch.float64, requires_grad=True)
    (found,) = torch.autograd.grad(part(x, start_flow(x)).sum(), x)
    assert found.abs().max() > 0
    assert not part(x.detach(), start_flow(x)).requires_grad
    assert memory.grad is None
    trained = built(coupling()).eval()
    trained(x.detach(), start_flow(x)).sum().backward()
    assert all(weight.grad is not None for weight in trained.parameters())


def test_what_can_not_be() -> None:
    with pytest.raises(SpecError, match="BatchNorm can't be walked a second time: its running statistics"):
        Reversible((Coupling(Chain((BatchNorm(WIDTH), Linear(WIDTH, WIDTH))), Linear(WIDTH, WIDTH)),))
    with pytest.raises(SpecError, match="needs at least one block"):
        Reversible(())
