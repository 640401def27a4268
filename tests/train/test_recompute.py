"""Blocks that are walked again for the gradients: the same gradients, dropout and routing too, in less memory."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from polyformer.bench.memory import memory_of
from polyformer.data.rows import TextBatch
from polyformer.errors import RunError
from polyformer.parts import (
    Attention,
    Buckets,
    Causal,
    Chain,
    Dropout,
    Embed,
    Experts,
    FeedForward,
    LMHead,
    Residual,
    RMSNorm,
    Rotary,
    RouterLosses,
    Stack,
    Tie,
    TokenEmbedding,
    Transformer,
)
from polyformer.parts.model import TransformerPart
from polyformer.spec import Spec
from polyformer.train.loop import _refuse_recompute, accumulate
from polyformer.train.recipe import TrainRecipe
from polyformer.tune import LoraChange, attach

WIDTH, LAYERS = 16, 4
PLAIN = TrainRecipe(precision="fp32", smoothing=0.0)
AGAIN = PLAIN.replace(recompute="blocks")


def model(position: Spec, feeding: Spec | None = None) -> TransformerPart:
    attention = Attention.of_width(WIDTH, 2, Causal()).replace(position=position)
    sublayers = attention, feeding or FeedForward.gated(WIDTH, 40)
    block = Chain(tuple(Residual(op, RMSNorm(WIDTH), Dropout(0.2)) for op in sublayers))
    table = "decoder.blocks.{}.steps.0.op.position.weight"
    shared = tuple(Tie(table.format(i), table.format(0)) for i in range(1, LAYERS) if isinstance(position, Buckets))
    spec = Transformer(
        target=Embed(TokenEmbedding(50, WIDTH)),
        decoder=Stack((block,) * LAYERS, RMSNorm(WIDTH)),
        head=LMHead.of_width(WIDTH, 50),
        ties=shared,
    )
    torch.manual_seed(2)
    made = spec.build().train()
    assert isinstance(made, TransformerPart)
    return made


def batch(rows: int = 3, length: int = 12) -> TextBatch:
    ids = torch.randint(50, (rows, length + 1), generator=torch.Generator().manual_seed(1))
    return TextBatch(ids[:, :-1], ids[:, 1:], None, None, rows * length, np.arange(rows))


def gradients(made: TransformerPart, recipe: TrainRecipe) -> dict[str, torch.Tensor]:
    made.zero_grad()
    torch.manual_seed(7)
    accumulate(made, [batch()], recipe)
    return {name: one.grad.clone() for name, one in made.named_parameters() if one.grad is not None}


ROUTED = Experts.of(FeedForward.of_widths(WIDTH, 12), WIDTH, 3, 2).replace(losses=RouterLosses(0.5, 0.1))


@pytest.mark.parametrize(
    ("position", "feeding"),
    [(Rotary(WIDTH // 2), None), (Buckets(2, 8, 16), None), (Rotary(WIDTH // 2), ROUTED)],
    ids=["rotary", "one bias for all layers", "experts"],
)
def test_gradients_are_the_same(position: Spec, feeding: Spec | None) -> None:
    made = model(position, feeding)
    wanted, found = gradients(made, PLAIN), gradients(made, AGAIN)
    assert found.keys() == wanted.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-5, atol=1e-7, msg=name)


def test_adapters_are_trained_so() -> None:
    made = attach(model(Rotary(WIDTH // 2)), LoraChange(rank=2)).train()
    wanted, found = gradients(made, PLAIN), gradients(made, AGAIN)
    assert {name.rpartition(".")[2] for name in found} == {"a", "b"}
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-5, atol=1e-7, msg=name)


def test_it_takes_less() -> None:
    made, big = attach(model(Rotary(WIDTH // 2)), LoraChange(rank=2)), batch(8, 128)
    taken = []
    for recipe in (PLAIN, AGAIN):
        accumulate(made, [big], recipe)
        taken.append(memory_of(lambda recipe=recipe: [torch.tensor(accumulate(made, [big], recipe)[0])]).peak)
    assert taken[1] < 0.6 * taken[0]


def test_what_can_not_be_walked_twice_is_refused() -> None:
    from polyformer.swap import SwapNorms

    spec = SwapNorms("batch").apply(model(Rotary(WIDTH // 2)).spec)
    made = spec.build()
    assert isinstance(made, TransformerPart)
    with pytest.raises(RunError, match="BatchNorm can't be trained with recompute=blocks"):
        _refuse_recompute(made, AGAIN)
    _refuse_recompute(made, PLAIN)
