"""gMLP's spatial gating unit by its formula, and at its limits."""

from __future__ import annotations

import pytest
import torch

from polyformer.errors import SpecError
from polyformer.parts import Causal, Everyone, Rule, SpatialGating
from polyformer.parts.flow import start_flow

HIDDEN, LENGTH = 6, 7


@pytest.mark.parametrize("length", [1, 4, LENGTH])
@pytest.mark.parametrize("see", [Everyone(), Causal()], ids=["everyone", "causal"])
def test_row_by_row(see: Rule, length: int) -> None:
    part = SpatialGating.of_width(HIDDEN, LENGTH, see).build(dtype=torch.float64)
    for weight in part.parameters():
        torch.nn.init.normal_(weight)
    x = torch.randn(2, length, HIDDEN, dtype=torch.float64)
    out = part(x, start_flow(x))
    for row, got in zip(x, out, strict=True):
        passed, gate = row[:, : HIDDEN // 2], part.norm(row[:, HIDDEN // 2 :], None)
        for i in range(length):
            seen = range(i + 1) if see == Causal() else range(length)
            mixed = sum(part.weight[i, j] * gate[j] for j in seen) + part.bias[i]
            torch.testing.assert_close(got[i], passed[i] * mixed)


def test_it_begins_by_passing_half_of_a_row_on() -> None:
    part, x = SpatialGating.of_width(HIDDEN, LENGTH, Everyone()).build(), torch.randn(2, LENGTH, HIDDEN)
    torch.testing.assert_close(part(x, start_flow(x)), x[..., : HIDDEN // 2], atol=0.05, rtol=0.05)


def test_no_row_is_too_many_until_one_is() -> None:
    part = SpatialGating.of_width(HIDDEN, LENGTH, Everyone()).build()
    none, many = torch.zeros(2, 0, HIDDEN), torch.zeros(2, LENGTH + 1, HIDDEN)
    assert part(none, start_flow(none)).shape == (2, 0, HIDDEN // 2)
    with pytest.raises(SpecError, match="a sequence of 8 rows is longer than the 7 it knows"):
        part(many, start_flow(many))
    mask = torch.ones(2, LENGTH + 1)
    mask[:, 0] = 0
    assert torch.isfinite(part(many, start_flow(many, mask))).all()


def test_what_can_not_be() -> None:
    with pytest.raises(SpecError, match="their width can't be 5"):
        SpatialGating.of_width(5, LENGTH, Everyone())
    with pytest.raises(SpecError, match="length must be at least 1"):
        SpatialGating.of_width(6, 0, Everyone())
