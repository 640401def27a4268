"""Axial positions: a place's vector by its coordinates, what is dropped together, and bad input."""

from __future__ import annotations

import pytest
import torch

from polyformer.errors import SpecError
from polyformer.parts import Add, Axial, Dropout, Embed, TokenEmbedding
from polyformer.parts.flow import start_flow
from polyformer.parts.positions import AxialPart


def built(spec: Axial) -> AxialPart:
    part = spec.build()
    assert isinstance(part, AxialPart)
    return part


def test_places_are_coordinates_whose_last_runs_fastest() -> None:
    part = built(Axial.of_axes((3, 4, 2), (5, 1, 2)))
    ids = torch.zeros(2, 24, dtype=torch.long)
    first, second, third = part.parameters()
    wanted = torch.cat(
        (
            first[:, None, None].expand(3, 4, 2, 5),
            second[None, :, None].expand(3, 4, 2, 1),
            third[None, None].expand(3, 4, 2, 2),
        ),
        -1,
    ).flatten(0, 2)
    assert torch.equal(part(ids, start_flow(ids))[0], wanted)
    shorter = ids[:, :7]
    assert torch.equal(part(shorter, start_flow(shorter))[0], wanted[:7])


def test_places_are_counted_without_padding() -> None:
    part = built(Axial.of_axes((2, 3), (2, 2)))
    ids = torch.zeros(1, 6, dtype=torch.long)
    whole = part(ids, start_flow(ids))[0]
    left = part(ids, start_flow(ids, torch.tensor([[0, 0, 1, 1, 1, 1]])))[0]
    assert torch.equal(left[2:], whole[:4])


def test_dropout_drops_columns_of_the_grid_for_each_text_by_itself() -> None:
    part = built(Axial.of_axes((5, 40), (2, 2)).replace(dropout=0.25)).train()
    ids = torch.zeros(3, 200, dtype=torch.long)
    torch.manual_seed(0)
    found = part(ids, start_flow(ids)).view(3, 5, 40, 4)
    kept = found.ne(0).all(-1)
    assert torch.equal(kept, kept[:, :1].expand_as(kept))
    assert not torch.equal(kept[0], kept[1])
    assert 0.6 < float(kept.float().mean()) < 0.9
    whole = part.eval()(ids, start_flow(ids)).expand(3, -1, -1).view_as(found)
    torch.testing.assert_close(found[kept], whole[kept] / 0.75)


def test_tokens_and_positions_are_dropped_by_themselves() -> None:
    tokens, positions = TokenEmbedding(5, 4), Axial.of_axes((2, 3), (2, 2))
    ids = torch.zeros(1, 6, dtype=torch.long)
    halved = Embed(tokens, positions, Add(Dropout(0.5), None)).build().train()
    torch.manual_seed(0)
    found = halved(ids, start_flow(ids)) - halved.positions(ids, start_flow(ids))
    whole = halved.tokens(ids)
    ratio = found / whole
    assert set(ratio.flatten().round(decimals=3).tolist()) == {0.0, 2.0}
    both = Embed(tokens, positions, Add(None, Dropout(0.5)))
    assert Embed.from_json(both.to_json()) == both


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Axial(8, shape=(2, 3), widths=(4, 5)), "make 9 values, not 8"),
        (lambda: Axial(8, shape=(2, 3), widths=(8,)), "must have a number above 0 for each axis"),
        (lambda: Axial(8, shape=(2, 0), widths=(4, 4)), "must have a number above 0 for each axis"),
        (lambda: Axial(8), "must have a number above 0 for each axis"),
        (lambda: Axial(8, 7, shape=(2, 3), widths=(4, 4)), r"a grid of \(2, 3\) has 6 places, not 7"),
        (lambda: Axial(8, offset=1, shape=(2, 3), widths=(4, 4)), "the places of a grid are counted from 0"),
        (lambda: Axial(8, shape=(2, 3), widths=(4, 4), dropout=1.0), r"dropout must be in \[0, 1\), not 1.0"),
    ],
)
def test_what_can_not_be(make, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        make()


def test_a_text_that_has_no_places_left() -> None:
    part, ids = built(Axial.of_axes((2, 3), (2, 2))), torch.zeros(1, 7, dtype=torch.long)
    with pytest.raises(SpecError, match="a sequence of 7 tokens is longer than the model's 6 positions"):
        part(ids, start_flow(ids))
