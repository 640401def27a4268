"""Codes in four and eight bits, held against bitsandbytes and against their definition."""

from __future__ import annotations

import warnings
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from polyformer.shrink.codes import dynamic_map, from_bytes, levels, pairs, to_bytes, to_halves

SIZES = (1, 2, 63, 64, 65, 256, 257, 64 * 300, 64 * 300 + 7)


@pytest.fixture(scope="module")
def peer() -> ModuleType:
    """Return `bitsandbytes.functional`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("bitsandbytes", reason="bitsandbytes, the oracle of 4-bit codes, is not installed")
        import bitsandbytes.functional as peer
    return peer


def exact(x: Tensor, table: Tensor) -> Any:
    """Return what bitsandbytes' own PyTorch implementation makes of x: its CPU kernel rounds twice since 0.49."""
    plain = torch.ops.bitsandbytes.quantize_blockwise.default
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return plain._op_dk(torch._C.DispatchKey.CompositeExplicitAutograd, x, table, 256)


def drawn(size: int, seed: int = 0) -> Tensor:
    """Draw weights of which some are 0, some large, and some at equal distances from two levels."""
    x = torch.randn(size, generator=torch.Generator().manual_seed(seed + size)) * 0.02
    x[::7] = 0
    x[5::11] *= 20
    if size > 64:
        ordered = levels("nf4")
        x[64:79][: size - 64] = ((ordered[:-1] + ordered[1:]) / 2)[: size - 64]
    return x


@pytest.mark.parametrize("form", ["nf4", "fp4"])
class TestFourBits:
    @pytest.mark.parametrize("size", SIZES)
    def test_codes_and_magnitudes_are_the_peers(self, peer: ModuleType, form: Any, size: int) -> None:
        for block in (32, 64, 256):
            x = drawn(size)
            codes, state = peer.quantize_4bit(x, blocksize=block, quant_type=form)
            ours, largest = to_halves(x, block, form)
            assert torch.equal(ours, codes.view(-1))
            assert torch.equal(largest, state.absmax)

    def test_levels_are_the_peers(self, peer: ModuleType, form: Any) -> None:
        assert torch.equal(levels(form), peer.get_4bit_type(form, device="cpu"))

    def test_a_byte_is_two_levels(self, form: Any) -> None:
        both = pairs(form).view(torch.float32).view(256, 2)
        assert torch.equal(both[0x4F], torch.stack((levels(form)[4], levels(form)[15])))

    def test_each_number_gets_the_nearest_level(self, form: Any) -> None:
        x = torch.linspace(-1, 1, 4096)
        codes, _ = to_halves(x, 4096, form)
        found = pairs(form).view(torch.float32).view(256, 2)[codes.long()].view(-1)
        nearest = (x[:, None] - levels(form)).abs().amin(1)
        assert torch.allclose((x - found).abs(), nearest, atol=1e-7)


@pytest.mark.parametrize("signed", [True, False])
class TestEightBits:
    def test_the_map_is_the_peers(self, peer: ModuleType, signed: bool) -> None:
        assert torch.equal(dynamic_map(signed), peer.create_dynamic_map(signed))

    @pytest.mark.parametrize("size", SIZES)
    def test_codes_and_magnitudes_are_the_peers(self, peer: ModuleType, signed: bool, size: int) -> None:
        x = drawn(size) if signed else drawn(size).abs() ** 3
        codes, largest = to_bytes(x, 256, signed)
        theirs, magnitudes = exact(x, dynamic_map(signed))
        assert torch.equal(codes, theirs)
        assert torch.equal(largest, magnitudes)
        state = peer.QuantState(absmax=largest, code=dynamic_map(signed), blocksize=256, dtype=torch.float32)
        assert torch.equal(from_bytes(codes, largest, 256, signed), peer.dequantize_blockwise(codes, state))

    def test_the_map_is_that_of_the_paper(self, signed: bool) -> None:
        found = dynamic_map(signed)
        assert len(found) == 256
        assert bool((found.diff() > 0).all())
        assert (float(found[-1]), float(found.abs().min())) == (1.0, 0.0)
        decades = [int(((found >= 10.0**-i) & (found < 10.0 ** (1 - i))).sum()) for i in range(1, 8)]
        assert decades == [2**i * (1 if signed else 2) for i in range(6, -1, -1)]


@given(st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=200), st.sampled_from([8, 64]))
def test_what_comes_back_is_near(values: list[float], block: int) -> None:
    x = torch.tensor(values)
    codes, largest = to_bytes(x, block)
    found = from_bytes(codes, largest, block)
    bound = largest.repeat_interleave(block)[: len(x)]
    assert bool(((x - found).abs() <= 0.0071 * bound + 1e-37).all())


def test_a_block_of_zeros_is_zeros() -> None:
    x = torch.zeros(130)
    assert not from_bytes(*to_bytes(x, 64), 64).any()
    for form in ("nf4", "fp4"):
        codes, largest = to_halves(x, 64, form)
        assert float(largest.max()) <= 1e-38
        assert not pairs(form).view(torch.float32).view(256, 2)[codes.long()].any()
