"""Models without residual connections, and without attention: swapped in, with all their tensors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from polyformer.errors import SpecError
from polyformer.families.gmlp import GMLP
from polyformer.parts import Attention, AttentionFree, Chain, Residual, Transformer
from polyformer.parts.flow import GrowingCache, start_flow
from polyformer.spec import Record, walk
from polyformer.swap import Conversion, Swap, SwapResiduals, Swaps, transplant
from tests.parts.models import SHAPES, build, decoder, translator
from tests.swap.models import VOCABULARY, gpt, t5

IDS = torch.randint(VOCABULARY, (2, 7), generator=torch.Generator().manual_seed(0))


def step_by_step(model: Any, ids: Tensor) -> Tensor:
    """A pre-norm decoder whose sublayers stand one behind the other."""
    x = model.target.tokens.weight[ids] + model.target.positions.weight[: ids.shape[1]]
    for block in model.decoder.blocks:
        for sublayer in block.steps:
            x = sublayer.op(sublayer.pre(x, None), start_flow(ids))
    return model.head(model.decoder.norm(x, None))


@pytest.mark.parametrize(
    "spec",
    [
        gpt(),
        t5(),
        decoder(SHAPES["sandwich-gqa-swiglu"]),
        translator(SHAPES["2017"]),
        GMLP(VOCABULARY, 9, 8, 12, 2).spec(),
    ],
    ids=["gpt", "t5", "sandwich", "translator", "gmlp"],
)
def test_residuals_are_taken_away_and_nothing_else(spec: Transformer) -> None:
    """Every tensor is carried over, ties too; what is left is chains of what stood in the slots."""
    model = build(spec)
    new, report = transplant(model, SwapResiduals())
    assert not any(isinstance(record, Residual) for _, record in walk(new.spec))
    assert set(report.summary) <= {"kept", "mapped"}
    assert len(new.spec.ties) == len(spec.ties)  # type: ignore[attr-defined]
    values = [sorted(float(p.detach().double().square().sum()) for p in one.parameters()) for one in (model, new)]
    assert values[0] == values[1]


def test_what_such_a_model_computes() -> None:
    model = build(gpt(2)).eval()
    new, _ = transplant(model, Conversion(residuals="none"))
    torch.testing.assert_close(new(IDS).logits, step_by_step(model, IDS))
    assert not torch.allclose(new(IDS).logits, model(IDS).logits)


def test_an_inner_residual_is_found_again() -> None:
    inner = Residual(Attention.of_width(16, 4, gpt().decoder.blocks[0].steps[0].op.see))  # type: ignore[union-attr]
    spec = gpt(1)
    block = Chain((Residual(Chain((inner, inner))),))
    spec = spec.replace(decoder=spec.decoder.replace(blocks=(block, block)))  # type: ignore[union-attr]
    _, report = transplant(build(spec), SwapResiduals())
    assert set(report.summary) <= {"kept", "mapped"}


def test_without_attention_every_tensor_stays() -> None:
    """The kernel takes queries, keys and values as they are, so that all projections have their place."""
    model = build(gpt(2)).eval()
    new, report = transplant(model, Conversion(kernel=AttentionFree()))
    assert list(report.summary) == ["kept"]
    whole, cache = new(IDS).logits, GrowingCache()
    pieces = torch.cat([new(IDS[:, i : i + 1], cache=cache).logits for i in range(7)], 1)
    torch.testing.assert_close(pieces, whole)
    assert not torch.allclose(whole, model(IDS).logits)


@pytest.mark.parametrize(
    "swap", [Conversion(residuals="none"), Conversion(kernel=AttentionFree()), Swaps((SwapResiduals(),))]
)
def test_they_are_data_and_learn(swap: Swap) -> None:
    assert Record.from_json(swap.to_json()) == swap
    spec = swap.apply(gpt(2))
    assert Transformer.from_json(spec.to_json()) == spec
    torch.manual_seed(0)
    model: Any = spec.build()
    optimiser, losses = torch.optim.Adam(model.parameters(), 5e-3), []
    ids = torch.arange(24)[None] % 5
    for _ in range(30):
        loss = torch.nn.functional.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] / 2


def test_refused() -> None:
    with pytest.raises(SpecError, match="no residual connections that could be taken away"):
        SwapResiduals().apply(SwapResiduals().apply(gpt()))
    with pytest.raises(SpecError, match="residuals should be one of 'none'"):
        Conversion(residuals="some")
