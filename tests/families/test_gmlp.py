"""gMLP by the paper's equations, in both directions."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from polyformer.errors import SpecError
from polyformer.families.gmlp import GMLP
from polyformer.parts.model import TransformerPart, parameters_of

SIZES = GMLP(vocabulary=13, length=9, width=8, hidden=12, layers=2)


def built(recipe: GMLP) -> TransformerPart:
    model = recipe.spec().build(dtype=torch.float64).eval()
    assert isinstance(model, TransformerPart)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.3 * torch.randn_like(weight))
    return model


@pytest.mark.parametrize("reads", ["both ways", "forwards"])
def test_by_the_equations(reads: str) -> None:
    """Section 2: Z = σ(XU), Z̃ = s(Z), Y = Z̃V, with a norm before and a shortcut around."""
    model = built(SIZES.replace(reads=reads))
    ids = torch.randint(13, (2, 9))
    side = model.target if reads == "forwards" else model.source
    stack = model.decoder if reads == "forwards" else model.encoder
    x = F.embedding(ids, side.tokens.weight)
    for block in stack.blocks:
        up, _, unit, down = block.op.steps
        z = F.gelu(up(block.pre(x)))
        first, second = z.chunk(2, -1)
        matrix = unit.weight.tril() if reads == "forwards" else unit.weight
        mixed = torch.einsum("ij,bjd->bid", matrix, unit.norm(second)) + unit.bias[:, None]
        x = x + down(first * mixed)
    wanted = F.linear(stack.norm(x), side.tokens.weight)
    torch.testing.assert_close(model(ids).logits, wanted)


def test_forwards_sees_nothing_that_comes() -> None:
    model = built(SIZES.replace(reads="forwards"))
    ids = torch.randint(13, (1, 9))
    torch.testing.assert_close(model(ids[:, :4]).logits, model(ids).logits[:, :4])


def test_sizes() -> None:
    block = 8 * 12 + 12 + 6 * 8 + 8 + 2 * 8 + 2 * 6 + 9 * 9 + 9
    assert parameters_of(built(SIZES)) == 13 * 8 + 2 * block + 2 * 8
    assert GMLP.from_toml(SIZES.to_toml()) == SIZES
    with pytest.raises(SpecError, match="hidden must be even, not 7"):
        SIZES.replace(hidden=7)
    with pytest.raises(SpecError, match="sizes must be at least 1"):
        SIZES.replace(layers=0)
