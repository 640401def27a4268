"""Attention in blocks against the dense computation of the same rule, in double precision, gradients too."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from torch import Tensor

from polyformer.errors import SpecError
from polyformer.parts import (
    Alibi,
    BlockSparse,
    BlockWindow,
    Causal,
    Context,
    Edges,
    Everyone,
    InTraining,
    Marked,
    RandomBlocks,
    Rule,
    SameDocument,
    Softmax,
    Window,
)
from polyformer.parts.flow import start_flow
from polyformer.parts.kernels.blocksparse import plan_of
from polyformer.parts.view import View
from tests.parts.reference import Plain

DRAWN = RandomBlocks(2, 1, 4, seed=3)
RULES: dict[str, Rule] = {
    "window": Window(3),
    "causal window": Causal() & Window(4),
    "dilated window": Window(2, 3),
    "window of blocks": BlockWindow(2),
    "window and both ends": BlockWindow(2) | Edges(2),
    "BigBird": BlockWindow(2) | Edges(2) | InTraining(DRAWN),
    "blocks that heads draw": DRAWN,
    "first tokens": Window(3) | Edges(1, 2, 0),
    "other blocks than the kernel's": BlockWindow(4, 0) | Edges(4, 0, 1),
    "marked tokens": Window(3) | Marked(),
    "marked tokens of a document": (Window(3) | Marked()) & SameDocument(),
    "documents": SameDocument(),
}
LENGTHS = (1, 2, 7, 16, 23, 40)
rules = pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())


def draw(length: int, heads: int = 4, groups: int = 4, batch: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    chance = torch.Generator().manual_seed(length)

    def one(count: int) -> Tensor:
        return torch.randn(batch, count, length, 3, generator=chance, dtype=torch.float64).requires_grad_()

    return one(heads), one(groups), one(groups)


def view_of(length: int, kind: str = "plain") -> View:
    rows = torch.zeros(2, length)
    places = torch.arange(length)
    valid = {
        "right": places < torch.tensor([[length], [length // 2 + 1]]),
        "left": places >= torch.tensor([[0], [length // 3]]),
        "none real": places < torch.tensor([[length], [0]]),
    }.get(kind)
    documents = places // 5 * torch.ones(2, 1, dtype=torch.long) if kind == "packed" else None
    view = start_flow(rows, valid, documents).view
    marked = (places % 6 == 1) & (torch.arange(2)[:, None] * 4 <= places)
    return view.marking(marked if valid is None else marked & valid)


def both(spec: BlockSparse, qkv: tuple[Tensor, Tensor, Tensor], context: Context) -> tuple[list[Tensor], list[Tensor]]:
    """Return answers and gradients, in blocks and dense."""
    found = []
    for kernel in (spec, spec.full):
        out = cast(Any, kernel.build()).attend(qkv, context)
        weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
        sources = () if context.bias is None else [one for one in context.bias.sources if one.requires_grad]
        found.append([out, *torch.autograd.grad((out * weights).sum(), (*qkv, *sources), retain_graph=True)])
    return found[0], found[1]


def close(pair: tuple[list[Tensor], list[Tensor]]) -> None:
    for one, other in zip(*pair, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@rules
@pytest.mark.parametrize("kind", ["plain", "right", "left", "none real", "packed"])
def test_it_is_the_dense_computation(rule: Rule, kind: str) -> None:
    for length in LENGTHS:
        close(both(BlockSparse(2), draw(length), Context(rule, view_of(length, kind))))


@rules
def test_grouped_heads(rule: Rule) -> None:
    for groups in (1, 2):
        close(both(BlockSparse(2), draw(23, 4, groups), Context(rule, view_of(23, "right"))))


@rules
@pytest.mark.parametrize("block", [1, 3, 4, 50])
def test_blocks_of_any_size(rule: Rule, block: int) -> None:
    close(both(BlockSparse(block, Softmax(0.3)), draw(23, 4, 2), Context(rule, view_of(23, "left"))))


@rules
@pytest.mark.parametrize("groups", [4, 2])
def test_a_bias_with_gradients(rule: Rule, groups: int) -> None:
    bias = torch.randn(2, 4, 23, 23, dtype=torch.float64, requires_grad=True)
    view = view_of(23, "right")
    close(both(BlockSparse(2), draw(23, 4, groups), Context(rule, view, Plain(view, (bias,)))))


@rules
def test_a_bias_without(rule: Rule) -> None:
    qkv, flow = draw(23), start_flow(torch.zeros(2, 23))
    bias = cast(Any, Alibi(4).build()).bias(qkv[0], flow)
    close(both(BlockSparse(2), qkv, Context(rule, flow.view, bias)))


def test_a_few_blocks_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("polyformer.parts.kernels.gathered.SPAN", 40)
    for rule in RULES.values():
        close(both(BlockSparse(2), draw(23, 4, 2), Context(rule, view_of(23, "right"))))


class TestPlan:
    def test_blocks_that_look_at_all_are_apart(self) -> None:
        plan = plan_of(BlockWindow(2) | Edges(2), view_of(40), 2)
        assert plan is not None
        assert plan.wide.tolist() == [0, 19]
        assert plan.blocks.shape == (1, 18, 5)

    def test_whole_blocks_need_no_mask_of_rows(self) -> None:
        plan = plan_of(BlockWindow(2), view_of(40, "right"), 2)
        assert plan is not None
        assert plan.allowed is not None
        assert plan.allowed.shape == (2, 1, 20, 1, 6)
        assert plan_of(BlockWindow(2, 0), view_of(40), 2).allowed is None  # type: ignore[union-attr]

    def test_scattered_keys_cost_no_blocks(self) -> None:
        plan = plan_of(Window(3) | Marked(), view_of(40), 2)
        assert plan is not None
        assert len(plan.wide) == 0
        assert plan.keys.shape[-1] == 3 * 2 + 7

    @pytest.mark.parametrize("rule", [Everyone(), Window(99), BlockWindow(2, 9), Causal(), SameDocument()])
    def test_where_little_is_left_out_all_is_worked_out(self, rule: Rule) -> None:
        view = view_of(12)
        assert plan_of(rule.here(view), view, 2) is None

    def test_layers_share_it(self) -> None:
        view, made = view_of(40), []
        part = cast(Any, BlockSparse(2).build())
        for _ in range(2):
            part.attend(draw(40), Context(Window(3), view))
            made.append(view._made["plan", Window(3), 2])
        assert made[0] is made[1]


@pytest.mark.parametrize("rule", [Window(33), BlockWindow(16) | Edges(16)])
@pytest.mark.parametrize("length", [1024, 4096])
def test_nothing_gathered_is_kept(rule: Rule, length: int) -> None:
    """Memory that training holds grows with the rows, not with what they look at."""
    q, k, v = (one.float().detach().requires_grad_() for one in draw(length, batch=1))
    kept: dict[int, int] = {}

    def keep(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    part, view = cast(Any, BlockSparse(16).build()), start_flow(torch.zeros(1, length)).view
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        part.attend((q, k, v), Context(rule, view))
    assert sum(kept.values()) < 8 * q.nbytes


@pytest.mark.parametrize("length", [0, 1])
def test_hardly_any_rows(length: int) -> None:
    part = cast(Any, BlockSparse(4).build())
    out = part.attend(draw(length), Context(Window(2) | Edges(2), view_of(length)))
    assert out.shape == (2, 4, length, 3)
    assert torch.isfinite(out).all()


def test_dropout_is_that_of_the_sparse_form() -> None:
    sparse = cast(Any, BlockSparse(2, dropout=0.5).build())
    qkv, context = draw(40), Context(Window(3), view_of(40))
    assert torch.equal(sparse.eval().attend(qkv, context), cast(Any, BlockSparse(2).build()).attend(qkv, context))
    assert not torch.equal(sparse.train().attend(qkv, context), sparse.attend(qkv, context))
    short = Context(Everyone(), view_of(40))
    assert torch.equal(sparse.attend(qkv, short), sparse.attend(qkv, short))


def test_bfloat16_in_training() -> None:
    qkv = tuple(one.detach().bfloat16().requires_grad_() for one in draw(40))
    found, wanted = both(BlockSparse(2), cast(Any, qkv), Context(Window(3) | Edges(2), view_of(40, "right")))
    for one, other in zip(found, wanted, strict=True):
        assert one.dtype == torch.bfloat16
        torch.testing.assert_close(one, other, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: BlockSparse(0), "block must be at least 1, not 0"),
        (lambda: BlockSparse(dropout=1.0), r"dropout must be in \[0, 1\)"),
    ],
)
def test_bad_settings(make: Any, told: str) -> None:
    with pytest.raises(SpecError, match=told):
        make()
