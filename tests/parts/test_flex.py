"""FlexAttention against the dense computation of the same rule: answers, biases, blocks; and what it refuses."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from polyformer.errors import SpecError
from polyformer.parts import (
    BlockWindow,
    Causal,
    Context,
    Edges,
    Everyone,
    Flex,
    InTraining,
    Kernel,
    Rule,
    SameDocument,
    Softmax,
    Window,
    contract_of,
)
from polyformer.parts.flow import Flow, start_flow
from polyformer.parts.kernels.flex import SIZE, block_mask
from polyformer.parts.rules import Nobody
from polyformer.parts.view import View
from tests.parts.test_exact import draw, laid_out
from tests.parts.test_places import BIASES, rules, views

EAGER = Flex(form="eager")
RULES: dict[str, Rule] = {
    "everyone": Everyone(),
    "documents": Causal() & SameDocument(),
    "dilated": Causal() & Window(3, 2),
    "of both sides": Window(2) & SameDocument(),
    "either": (SameDocument() & Window(2)) | (Causal() & Window(2, 3)),
    "nobody": Nobody(),
}
LAYOUTS = ("plain", "padded", "gaps", "packed", "cached")


@torch.no_grad()
def assert_dense(kernel: Kernel, rule: Rule, view: View, qkv: list[Tensor], bias: Any = None) -> None:
    """Compare with `Softmax`; a padded query may see what it likes."""
    found, wanted = (
        cast(Any, spec.build()).attend(qkv, Context(rule, view, bias))
        for spec in (kernel, Softmax(getattr(kernel, "scale", None)))
    )
    real = torch.ones(found.shape[0], found.shape[2], dtype=torch.bool)
    if view.valid is not None:
        real = view.valid[:, view.keys - view.queries :].expand_as(real)
    torch.testing.assert_close(found.transpose(1, 2)[real], wanted.transpose(1, 2)[real])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", RULES)
def test_any_rule_and_layout(name: str, layout: str) -> None:
    view = laid_out(layout).view
    assert_dense(EAGER, RULES[name], view, draw(view.queries, view.keys, 4, 2))


@settings(max_examples=10)
@given(rule=rules(), view=views(), shared=st.sampled_from([1, 2, 4]))
def test_any_rule_and_any_padding(rule: Rule, view: View, shared: int) -> None:
    assert_dense(EAGER, rule, view, draw(view.queries, view.keys, 4, 4 // shared))


@pytest.mark.parametrize("length", [0, 1, 2, SIZE, SIZE + 1])
def test_any_length(length: int) -> None:
    assert_dense(EAGER, RULES["documents"], start_flow(torch.zeros(3, length)).view, draw(length, length))


@torch.no_grad()
def test_nothing_to_look_at_gives_zeros() -> None:
    for queries, keys in ((5, 0), (5, 7)):
        view = View(queries, keys, torch.zeros(3, keys, dtype=torch.bool), None, False, torch.device("cpu"))
        found = cast(Any, EAGER.build()).attend(draw(queries, keys), Context(Everyone(), view))
        assert found.equal(torch.zeros_like(found))


def biased(bias: str, flow: Flow) -> tuple[Any, list[Tensor]]:
    torch.manual_seed(0)
    part = cast(Any, BIASES[bias].build(dtype=torch.float64))
    for weight in part.parameters():
        torch.nn.init.normal_(weight)
    qkv = draw(flow.view.queries, flow.view.keys)
    return part.bias(qkv[0], flow), qkv


@torch.no_grad()
@pytest.mark.parametrize("layout", ["padded", "gaps", "cached"])
@pytest.mark.parametrize("bias", BIASES)
def test_any_bias(bias: str, layout: str) -> None:
    flow = laid_out(layout)
    made, qkv = biased(bias, flow)
    assert_dense(EAGER, RULES["documents"], flow.view, qkv, made)


@torch.no_grad()
def test_in_half_precision_and_with_another_scale() -> None:
    view = start_flow(torch.zeros(3, 13)).view
    assert_dense(EAGER.replace(scale=0.3), Causal(), view, draw(13, 13))
    qkv = [one.bfloat16() for one in draw(13, 13)]
    found = cast(Any, EAGER.build()).attend(qkv, Context(Causal(), view))
    wanted = cast(Any, Softmax().build()).attend([one.double() for one in qkv], Context(Causal(), view))
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), wanted, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("rule", [Causal(), Causal() & Window(200), Window(150, 2), SameDocument() & Causal()], ids=str)
@pytest.mark.parametrize("past", [0, 100])
def test_blocks_that_are_skipped_and_opened(rule: Rule, past: int) -> None:
    """What is skipped holds nothing that is allowed, what is opened nothing that isn't; a good part is either."""
    length = 5 * SIZE + 17
    documents = torch.arange(length)[None] // 300
    view = View(length - past, length, None, documents, False, torch.device("cpu"))
    allowed = rule.allowed(view)
    assert allowed is not None
    made = block_mask(rule, view, 1)
    none, opened = (torch.zeros(made.kv_indices.shape[-2:], dtype=torch.bool) for _ in range(2))
    assert made.full_kv_num_blocks is not None
    assert made.full_kv_indices is not None
    for i in range(len(none)):
        looked = made.kv_indices[0, 0, i, : made.kv_num_blocks[0, 0, i]]
        whole = made.full_kv_indices[0, 0, i, : made.full_kv_num_blocks[0, 0, i]]
        none[i], opened[i, whole] = True, True
        none[i, looked], none[i, whole] = False, False
    spread = [
        one.repeat_interleave(SIZE, 0).repeat_interleave(SIZE, 1)[: length - past, :length] for one in (none, opened)
    ]
    assert not allowed[0][spread[0]].any()
    assert allowed[0][spread[1]].all()
    assert int(none.sum() + opened.sum()) >= 4


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # PyTorch's compiler speaks of PyTorch's own parts
@torch.no_grad()
@pytest.mark.parametrize("name", ["dilated", "either"])
@pytest.mark.parametrize("layout", ["gaps", "cached"])
def test_compiled(name: str, layout: str) -> None:
    torch._dynamo.reset()
    flow = laid_out(layout)
    qkv = [one.float() for one in draw(flow.view.queries, flow.view.keys, 4, 2)]
    made = cast(Any, BIASES["alibi"].replace(heads=4).build()).bias(qkv[0], flow)
    assert_dense(Flex(), RULES[name], flow.view, qkv, made)


def test_refused_gradients() -> None:
    context = Context(Causal(), start_flow(torch.zeros(3, 5)).view)
    qkv, part = draw(5, 5), cast(Any, EAGER.build())
    with pytest.raises(SpecError, match="Flex can't be trained: PyTorch's FlexAttention has no backward pass on a CPU"):
        part.attend(qkv, context)
    assert part.attend([one.detach() for one in qkv], context).isfinite().all()
    assert "trained" in contract_of(Flex())


def test_refused_rules() -> None:
    for rule in (BlockWindow(2), Causal() & (Window(2) | Edges(2)), InTraining(Causal())):
        assert "a function of two places; it knows Everyone, Nobody, Causal" in Flex().unable(rule)
    for able in RULES.values():
        assert not Flex().unable(able)
