"""Token embeddings, their scale, and the ways in which positions join them."""

from __future__ import annotations

import pytest
import torch

from polyformer.errors import SpecError
from polyformer.parts import Concatenate, Dropout, Embed, Gate, LayerNorm, Learned, LMHead, Sinusoidal, TokenEmbedding
from polyformer.parts.embeddings import Add
from polyformer.parts.flow import start_flow

IDS = torch.tensor([[3, 1, 4, 1], [5, 9, 2, 6]])


def by_hand(part: torch.nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the scaled tokens [B, S, W] and the positions [1, S, P] of an embedding."""
    tokens = torch.stack([torch.stack([part.tokens.weight[int(i)] for i in row]) for row in IDS])
    return tokens * part.scale, part.positions(tokens, start_flow(IDS))


def test_tokens_are_rows_of_the_table() -> None:
    part = Embed(TokenEmbedding(11, 5)).build()
    assert torch.equal(part(IDS, start_flow(IDS))[1, 2], part.tokens.weight[2])
    assert float(TokenEmbedding(4000, 25).build().weight.detach().std()) == pytest.approx(0.2, rel=0.02)


@pytest.mark.parametrize("positions", [Sinusoidal(6), Learned(6, 4)], ids=["sinusoidal", "learned"])
class TestCombine:
    def test_add(self, positions: Sinusoidal) -> None:
        part = Embed(TokenEmbedding(11, 6), positions, Add(), scale=6**0.5).build()
        tokens, places = by_hand(part)
        torch.testing.assert_close(part(IDS, start_flow(IDS)), tokens + places)

    def test_concatenate(self, positions: Sinusoidal) -> None:
        part = Embed(TokenEmbedding(11, 3), positions, Concatenate(), scale=2.0).build()
        tokens, places = by_hand(part)
        out = part(IDS, start_flow(IDS))
        assert out.shape == (2, 4, 9)
        assert torch.equal(out[..., :3], tokens)
        assert torch.equal(out[..., 3:], torch.cat((places, places)))

    def test_gate(self, positions: Sinusoidal) -> None:
        part = Embed(TokenEmbedding(11, 6), positions, Gate.of_width(6), scale=3.0).build()
        torch.nn.init.normal_(part.combine.mix.bias)
        tokens, places = by_hand(part)
        out = part(IDS, start_flow(IDS))
        weight, bias = part.combine.mix.weight, part.combine.mix.bias
        for b in range(2):
            for s in range(4):
                both = torch.cat((tokens[b, s], places[0, s]))
                gate = 1 / (1 + torch.exp(-(weight @ both + bias)))
                torch.testing.assert_close(out[b, s], gate * tokens[b, s] + (1 - gate) * places[0, s])

    def test_norm_and_dropout_come_last(self, positions: Sinusoidal) -> None:
        part = Embed(TokenEmbedding(11, 6), positions, norm=LayerNorm(6), dropout=Dropout(0.5)).build()
        tokens, places = by_hand(part)
        flow = start_flow(IDS)
        expected = torch.nn.functional.layer_norm(tokens + places, (6,))
        torch.testing.assert_close(part.eval()(IDS, flow), expected)
        trained = part.train()(IDS, flow)
        kept = trained != 0
        assert kept.any()
        assert not kept.all()
        torch.testing.assert_close(trained[kept], 2 * expected[kept])


@pytest.mark.parametrize("combine", [Add(), Gate.of_width(6)], ids=["add", "gate"])
def test_widths_that_do_not_fit_are_named(combine: Add) -> None:
    with pytest.raises(SpecError, match=r"6 wide .* positions 4 wide"):
        Embed(TokenEmbedding(11, 6), Sinusoidal(4), combine).build()(IDS, start_flow(IDS))


def test_the_head_scores_every_token() -> None:
    part = LMHead.of_width(6, 11, bias=True).build()
    x = torch.randn(2, 4, 6)
    expected = torch.einsum("bsd,vd->bsv", x, part.projection.weight) + part.projection.bias
    torch.testing.assert_close(part(x), expected)
    assert LMHead.of_width(6, 11).build().projection.bias is None
