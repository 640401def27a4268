"""Linformer by equation 7 of its paper, and what it must refuse."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from polyformer.errors import SpecError
from polyformer.parts import (
    Alibi,
    Attention,
    Causal,
    Context,
    CrossAttention,
    Everyone,
    Linformer,
    Rule,
    SameDocument,
    Tie,
    Window,
)
from polyformer.parts.flow import Trace
from polyformer.parts.view import View
from polyformer.spec import Record, rewrite
from tests.parts.linear import SHAPE, forward_and_back, growth, with_kernel
from tests.parts.models import assert_same, build, encoder, gradients, pad, real, sentences, translator
from tests.parts.test_invariance import LENGTHS, loop, weigh

KINDS = {"separate": Linformer(11, 3), "shared": Linformer(11, 3, "shared", scale=0.7)}
kinds = pytest.mark.parametrize("spec", KINDS.values(), ids=KINDS.keys())


def view_of(queries: int, keys: int, valid: Tensor | None = None) -> View:
    return View(queries, keys, valid, None, False, torch.device("cpu"))


def by_formula(part: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Of one sequence without padding: softmax(scale · q (E k)ᵀ) (F v)."""
    several, keys = q.shape[1] // k.shape[1], k.shape[2]
    first = part.keys[:, :keys]
    second = first if part.values is None else part.values[:, :keys]
    mixed = torch.einsum("rk,bgke->bgre", first, k).repeat_interleave(several, 1)
    values = torch.einsum("rk,bgke->bgre", second, v).repeat_interleave(several, 1)
    scale = q.shape[-1] ** -0.5 if part.spec.scale is None else part.spec.scale
    return (scale * q @ mixed.mT).softmax(-1) @ values


@kinds
@pytest.mark.parametrize(("heads", "groups"), [(2, 2), (4, 2), (4, 1)])
@pytest.mark.parametrize(("queries", "keys"), [(11, 11), (7, 7), (1, 1), (2, 5), (3, 0)])
def test_the_formula(spec: Linformer, heads: int, groups: int, queries: int, keys: int) -> None:
    part: Any = spec.build(dtype=torch.float64)
    q = torch.randn(2, heads, queries, 4, dtype=torch.float64, requires_grad=True)
    k, v = (torch.randn(2, groups, keys, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    context = Context(Everyone(), view_of(queries, keys))
    found, expected = part.attend((q, k, v), context), by_formula(part, q, k, v)
    torch.testing.assert_close(found, expected)
    shown = part.weights(q, k, context) @ v.repeat_interleave(heads // groups, 1)
    torch.testing.assert_close(shown, found)
    leaves = [q, k, v, *part.parameters()]
    toward = torch.randn_like(found)
    pairs = (torch.autograd.grad((one * toward).sum(), leaves) for one in (found, expected))
    for one, other in zip(*pairs, strict=True):
        torch.testing.assert_close(one, other)


@kinds
class TestContract:
    @pytest.mark.parametrize("side", ["left", "right"])
    def test_a_padded_batch_is_each_sentence_alone(self, spec: Linformer, side: str) -> None:
        model = build(with_kernel(encoder(SHAPE), spec))
        rows = sentences(LENGTHS)
        ids, mask = pad(rows, side, 14)  # which is longer than the projection, as no sentence is
        batched = list(real(model(ids, mask).hidden, mask))
        alone = loop(model, rows)
        for one, other in zip(batched, alone, strict=True):
            torch.testing.assert_close(one, other)
        assert_same(gradients(model, weigh(batched)), gradients(model, weigh(alone)))

    def test_an_order_of_sentences_is_only_an_order(self, spec: Linformer) -> None:
        model = build(with_kernel(encoder(SHAPE), spec))
        ids, mask = pad(sentences(LENGTHS))
        order = torch.tensor([2, 0, 3, 1])
        torch.testing.assert_close(model(ids[order], mask[order]).hidden, model(ids, mask).hidden[order])

    def test_an_empty_sentence_gets_zeros(self, spec: Linformer) -> None:
        part: Any = spec.build()
        valid = torch.tensor([[True, True, False], [False, False, False]])
        q = torch.randn(2, 2, 3, 4)
        found = part.attend((q, q, q), Context(Everyone(), view_of(3, 3, valid)))
        assert (found[1] == 0).all()
        assert (found[0] != 0).all()

    def test_single_precision_is_near(self, spec: Linformer) -> None:
        wide, narrow = (build(with_kernel(encoder(SHAPE), spec), one) for one in (torch.float64, torch.float32))
        ids, mask = pad(sentences(LENGTHS))
        found = narrow(ids, mask).hidden
        torch.testing.assert_close(found.double(), wide(ids, mask).hidden, atol=2e-4, rtol=1e-3)

    def test_a_decoder_can_look_through_it(self, spec: Linformer) -> None:
        def crossing(path: str, record: Record) -> Record:
            return record.replace(kernel=spec) if isinstance(record, CrossAttention) else record

        model = build(rewrite(translator(SHAPE), crossing))
        sources, (target,) = sentences((4, 7)), sentences((3,), 1)
        ids, mask = pad(sources, "left")
        found = model(ids, mask, target.expand(2, -1)).logits
        alone = [model(one[None], None, target[None]).logits[0] for one in sources]
        torch.testing.assert_close(found, torch.stack(alone))


def test_layers_share_a_projection_by_a_tie() -> None:
    spec = with_kernel(encoder(SHAPE), Linformer(11, 3, "shared"))
    first, second = (f"encoder.blocks.{i}.steps.0.op.kernel.keys" for i in range(2))
    model = build(spec.replace(ties=(Tie(second, first),)))
    assert model.get_parameter(first) is model.get_parameter(second)
    assert "encoder.blocks.0.steps.0.op.kernel.values" not in dict(model.named_parameters())
    assert model(torch.zeros(1, 4, dtype=torch.long), trace=Trace()).hidden.isfinite().all()


def test_cost_is_linear() -> None:
    def run(n: int) -> None:
        part: Any = Linformer(n, 8).build()
        context = Context(Everyone(), view_of(n, n))
        forward_and_back(lambda *qkv: part.attend(qkv, context), *torch.randn(3, 1, 2, n, 4))

    largest, all_together = growth(run, 256)
    assert largest <= 2
    assert all_together <= 2.02


class TestRefused:
    @pytest.mark.parametrize("rule", [Causal(), Causal() & SameDocument(), Window(64)])
    def test_rules_of_order(self, rule: Rule) -> None:
        model = build(with_kernel(encoder(SHAPE), KINDS["separate"]))
        for block in model.encoder.blocks:
            block.steps[0].op.see = block.steps[0].op.settled = rule
        with pytest.raises(SpecError, match=r"Linformer can't honour the rule (Causal|Window)"):
            model(torch.zeros(1, 4, dtype=torch.long))

    def test_packed_documents(self) -> None:
        model = build(with_kernel(encoder(SHAPE), KINDS["separate"]))
        with pytest.raises(SpecError, match="can't be packed"):
            model(torch.zeros(1, 4, dtype=torch.long), document_ids=torch.tensor([[0, 0, 1, 1]]))

    def test_longer_texts(self) -> None:
        model = build(with_kernel(encoder(SHAPE), KINDS["separate"]))
        with pytest.raises(SpecError, match="this Linformer's projections are for up to 11 keys, not 12"):
            model(torch.zeros(1, 12, dtype=torch.long))
        ids, mask = pad(sentences((3, 12)), width=15)
        with pytest.raises(SpecError, match="for up to 11 keys, not 12"):
            model(ids, mask)

    def test_a_score_bias(self) -> None:
        def biased(path: str, record: Record) -> Record:
            return record.replace(position=Alibi(4)) if isinstance(record, Attention) else record

        model = build(rewrite(with_kernel(encoder(SHAPE), KINDS["separate"]), biased))
        with pytest.raises(SpecError, match="Linformer makes no scores"):
            model(torch.zeros(1, 4, dtype=torch.long))

    @pytest.mark.parametrize(
        ("keys", "told"),
        [
            ({"length": 0}, "length and rank"),
            ({"rank": 0}, "length and rank"),
            ({"dropout": 1.0}, "dropout must be in"),
            ({"projections": "some"}, "projections should be one of"),
        ],
    )
    def test_values(self, keys: dict[str, Any], told: str) -> None:
        with pytest.raises(SpecError, match=told):
            KINDS["separate"].replace(**keys)
