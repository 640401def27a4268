"""LoRA and its frozen base as one step, and gates whose activations aren't kept: separate steps' answers, with less."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from polyformer.parts import Adapted, FeedForward, Linear, LoRA
from polyformer.parts.adapters import AdaptedPart
from polyformer.parts.feedforward import ACTIVATIONS, through_gate
from polyformer.parts.part import Part
from polyformer.shrink import Linear4
from polyformer.spec import Spec


def adapted(base: Spec, dropout: float = 0.0) -> Part:
    from polyformer.parts import Dropout

    lora = LoRA("default", 1.0, 24, 40, 4, 6.0, dropout=Dropout(dropout) if dropout else None)
    part = Adapted(base, (lora,)).build().requires_grad_(False)
    for adapter in part.get_submodule("adapters").children():
        adapter.requires_grad_(True)
        for one in adapter.parameters():
            torch.nn.init.normal_(one)
    return part


def answers(part: Part, x: Tensor) -> list[Tensor]:
    """Return the answer and the gradients of the input and of all that learns."""
    y = part(x)
    weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)
    learning = [one for one in part.parameters() if one.requires_grad]
    return [y, *torch.autograd.grad((y * weights).sum(), [x, *learning])]


def nodes(y: Tensor) -> set[str]:
    """Return the names of the steps that a tensor's gradient goes through."""
    found, todo = set(), [y.grad_fn]
    while todo:
        node = todo.pop()
        if node is not None:
            found.add(node.name())
            todo += [after for after, _ in node.next_functions]
    return found


BASES = [Linear(24, 40), Linear(24, 40, bias=False), Linear4(24, 40), Linear4(24, 40, bias=False, scales="float32")]


@pytest.mark.parametrize("base", BASES, ids=str)
def test_one_step_is_both(base: Spec, monkeypatch: pytest.MonkeyPatch) -> None:
    part, x = adapted(base), torch.randn(2, 5, 24, requires_grad=True)
    found = answers(part, x)
    assert "LoRAProductBackward" in nodes(found[0])
    monkeypatch.setattr("polyformer.parts.adapters.joins", lambda *_: False)
    wanted = answers(part, x)
    assert "LoRAProductBackward" not in nodes(wanted[0])
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_where_the_base_learns_or_rows_are_dropped_steps_are_apart() -> None:
    x = torch.randn(3, 24, requires_grad=True)
    learning = adapted(Linear(24, 40))
    learning.get_submodule("base").requires_grad_(True)
    assert "LoRAProductBackward" not in nodes(learning(x))
    assert len(answers(learning, x)) == 2 + 4
    dropping = adapted(Linear(24, 40), 0.5).train()
    assert "LoRAProductBackward" not in nodes(dropping(x))
    assert "LoRAProductBackward" in nodes(dropping.eval()(x))
    with torch.autocast("cpu", torch.bfloat16):
        assert "LoRAProductBackward" not in nodes(adapted(Linear(24, 40))(x))
    with torch.no_grad():
        part = adapted(Linear(24, 40))
        assert isinstance(part, AdaptedPart)
        assert part(x).grad_fn is None


def test_of_the_rows_only_those_that_go_in_are_kept() -> None:
    part, kept = adapted(Linear(24, 40)), list[Tensor]()
    x = torch.randn(10, 24, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda one: kept.append(one) or one, lambda one: one):
        part(x)
    assert sorted(tuple(one.shape) for one in kept) == [(4, 24), (10, 4), (10, 24), (40, 4)]


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_gates(name: str) -> None:
    activation = ACTIVATIONS[name]
    gate, up = (torch.randn(3, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(lambda a, b: through_gate(activation, a, b), (gate, up))
    assert torch.equal(through_gate(activation, gate, up), activation(gate) * up)


def test_a_frozen_network_keeps_gate_and_up_alone() -> None:
    part, kept = FeedForward.gated(8, 20).build().requires_grad_(False), list[Tensor]()
    x = torch.randn(10, 8, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda one: kept.append(one) or one, lambda one: one):
        part(x, None)
    rows = [one for one in kept if one.shape[0] == 10]
    assert [tuple(one.shape) for one in rows] == [(10, 20), (10, 20)]
