"""Position schemes by their formulas, and their limits."""

from __future__ import annotations

import math

import pytest
import torch

from polyformer.errors import SpecError
from polyformer.parts import Learned, Sinusoidal
from polyformer.parts.flow import Flow, GrowingCache, start_flow


def flow_of(length: int, past: int = 0) -> Flow:
    cache = GrowingCache(length=past) if past else None
    return start_flow(torch.zeros(1, length), None, None, cache)


@pytest.mark.parametrize("width", [1, 2, 3, 6, 7, 16])
class TestSinusoidal:
    def test_interleaved_as_in_the_paper(self, width: int) -> None:
        table = Sinusoidal(width).build()(torch.zeros(1, 200, width), flow_of(200))
        assert table.shape == (1, 200, width)
        for place in (0, 1, 9, 64, 199):
            for i in range(width):
                angle = place / 10000 ** ((i - i % 2) / width)
                expected = math.cos(angle) if i % 2 else math.sin(angle)
                assert float(table[0, place, i]) == pytest.approx(expected, abs=1e-6)

    def test_halves_as_in_marian(self, width: int) -> None:
        table = Sinusoidal(width, layout="halves", base=500.0).build()(torch.zeros(1, 70, width), flow_of(70))
        sines = -(-width // 2)
        for place in (0, 1, 69):
            for i in range(width):
                pair = i if i < sines else i - sines
                angle = place / 500 ** (2 * pair / width)
                expected = math.sin(angle) if i < sines else math.cos(angle)
                assert float(table[0, place, i]) == pytest.approx(expected, abs=1e-6)

    def test_it_grows_as_needed(self, width: int) -> None:
        part = Sinusoidal(width).build()
        first = part(torch.zeros(1, 3, width), flow_of(3))
        later = part(torch.zeros(1, 5, width), flow_of(5, past=500))
        whole = Sinusoidal(width).build()(torch.zeros(1, 505, width), flow_of(505))
        assert torch.equal(later, whole[:, 500:])
        assert torch.equal(first, whole[:, :3])
        assert torch.equal(part(torch.zeros(1, 3, width), flow_of(3)), first)

    @pytest.mark.parametrize("longer", [65, 66, 129])
    def test_it_grows_by_one(self, width: int, longer: int) -> None:
        part = Sinusoidal(width).build()
        for length in (64, longer):
            assert part(torch.zeros(1, length, width), flow_of(length)).shape == (1, length, width)

    def test_it_has_no_weights(self, width: int) -> None:
        part = Sinusoidal(width).build()
        part(torch.zeros(1, 3, width), flow_of(3))
        assert not part.state_dict()


def test_marians_table_is_ours() -> None:
    transformers = pytest.importorskip("transformers.models.marian.modeling_marian")
    theirs = transformers.MarianSinusoidalPositionalEmbedding(30, 7)
    theirs.weight.data = theirs.create_weight() if hasattr(theirs, "create_weight") else theirs.weight.data
    ours = Sinusoidal(7, layout="halves").build()(torch.zeros(1, 30, 7), flow_of(30))
    torch.testing.assert_close(ours[0], theirs.weight.detach(), atol=1e-6, rtol=0)


class TestLearned:
    def test_it_looks_up_its_table(self) -> None:
        part = Learned(4, 9).build()
        assert torch.equal(part(torch.zeros(1, 9, 4), flow_of(9)), part.weight[None])
        assert torch.equal(part(torch.zeros(1, 2, 4), flow_of(2, past=6)), part.weight[None, 6:8])

    def test_it_needs_a_length(self) -> None:
        with pytest.raises(SpecError, match="learned positions need a length"):
            Learned(4)
        with pytest.raises(SpecError, match="length must be at least 1"):
            Learned(4, 0)


@pytest.mark.parametrize("spec", [Learned(4, 9), Sinusoidal(4, 9)], ids=["learned", "sinusoidal"])
class TestLength:
    def test_too_long_names_both_numbers(self, spec: Learned | Sinusoidal) -> None:
        part = spec.build()
        part(torch.zeros(1, 9, 4), flow_of(9))
        with pytest.raises(SpecError, match=r"sequence of 10 tokens is longer than the model's 9 positions; shorten"):
            part(torch.zeros(1, 10, 4), flow_of(10))
        with pytest.raises(SpecError, match=r"sequence of 12 tokens .* 9 positions"):
            part(torch.zeros(1, 4, 4), flow_of(4, past=8))

    def test_documents_and_left_padding_need_fewer(self, spec: Learned | Sinusoidal) -> None:
        part = spec.build()
        x = torch.zeros(1, 16, 4)
        documents = torch.tensor([[0] * 8 + [1] * 8])
        assert torch.equal(*part(x, start_flow(x, None, documents))[0].split(8))
        mask = torch.tensor([[0] * 9 + [1] * 7])
        straight = part(torch.zeros(1, 7, 4), flow_of(7))
        assert torch.equal(part(x, start_flow(x, mask))[:, 9:], straight)

    def test_nothing_is_not_too_long(self, spec: Learned | Sinusoidal) -> None:
        assert spec.build()(torch.zeros(1, 0, 4), flow_of(0)).shape == (1, 0, 4)
