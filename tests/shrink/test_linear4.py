"""The 4-bit affine map: equal to a `Linear` of the matrix that it holds, and to bitsandbytes', and holding no more."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from polyformer.bench.memory import memory_of
from polyformer.errors import SpecError, WeightsError
from polyformer.parts import Linear
from polyformer.shrink import Linear4
from polyformer.shrink.linear4 import Linear4Part
from polyformer.weights.assemble import assemble, disassemble

SHAPES = ((8, 5), (3, 5), (64, 7), (96, 130), (100, 33))


def made(spec: Linear4) -> Linear4Part:
    part = spec.build()
    assert isinstance(part, Linear4Part)
    return part


def gradients(y: Tensor, *wanted: Tensor) -> list[Tensor]:
    weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)
    return list(torch.autograd.grad((y * weights).sum(), wanted))


@pytest.mark.parametrize("form", ["nf4", "fp4"])
@pytest.mark.parametrize("scales", ["nested", "float32"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_is_the_product_with_the_matrix_it_holds(
    form: Any, scales: Any, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("polyformer.shrink.linear4.PIECE", 600)  # so that some are made in several pieces
    part = made(Linear4(*shape, form=form, scales=scales))
    x = torch.randn(2, 3, shape[0], requires_grad=True)
    y, wanted = part(x), F.linear(x, part.matrix(), part.bias)
    assert torch.allclose(y, wanted, atol=1e-6)
    assert part.bias is not None
    for found, own in zip(gradients(y, x, part.bias), gradients(wanted, x, part.bias), strict=True):
        assert torch.allclose(found, own, atol=1e-6)


@pytest.mark.parametrize("form", ["nf4", "fp4"])
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16], ids=str)
def test_the_matrix_is_the_peers(form: Any, kind: torch.dtype) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("bitsandbytes", reason="bitsandbytes, the oracle of 4-bit codes, is not installed")
        import bitsandbytes.functional as peer
    matrix = (torch.randn(300, 128) * 0.02).to(kind)
    for scales in ("float32", "nested"):
        spec = Linear4(128, 300, form=form, scales=scales)
        held = spec.held(matrix)
        codes, state = peer.quantize_4bit(matrix, quant_type=form, blocksize=64)
        if scales == "nested":  # what it makes of its magnitudes is compared in `test_codes`
            nested = held["nested_absmax"].view(torch.float32)
            state.absmax, state.nested = held["absmax"], True
            state.state2 = peer.QuantState(
                absmax=nested, code=peer.create_dynamic_map(), blocksize=256, dtype=torch.float32
            )
            state.offset = held["nested_offset"].view(torch.float32)
        assert torch.equal(held["codes"], codes.view(-1))
        assert torch.equal(spec.matrix(held).to(kind), peer.dequantize_4bit(codes, state).view(300, 128))


def test_it_takes_four_bits_and_an_eighth() -> None:
    spec = Linear4(512, 1024, bias=False)
    size = sum(tensor.numel() * tensor.element_size() for tensor in made(spec).state_dict().values())
    assert size * 8 / (512 * 1024) == pytest.approx(4 + 8 / 64 + 32 / 64 / 256, rel=1e-3)
    assert size < 0.15 * 512 * 1024 * 4


def test_no_more_than_a_piece_is_ever_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("polyformer.shrink.linear4.PIECE", 2**14)
    part, x = made(Linear4(512, 1024, bias=False)), torch.randn(4, 512, requires_grad=True)
    whole = 4 * 512 * 1024

    def step() -> list[Tensor]:
        y = part(x)
        return [y, *torch.autograd.grad(y.sum(), x)]

    assert memory_of(step).extra < whole / 5


def test_nothing_is_kept_for_the_way_back() -> None:
    part, kept = made(Linear4(64, 64, bias=False)), list[Tensor]()
    x = torch.randn(5, 64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda one: kept.append(one) or one, lambda one: one):
        part(x)
    assert not kept
    assert part(x.detach()).grad_fn is None


@pytest.mark.parametrize("compute", [None, "bfloat16"])
def test_precisions(compute: Any) -> None:
    part = made(Linear4(64, 32, compute=compute))
    x = torch.randn(3, 64)
    low = F.linear(x.bfloat16(), part.matrix().bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        assert part(x).dtype == torch.bfloat16
    found = part(x)
    assert found.dtype == x.dtype
    wanted = low.float() if compute else F.linear(x, part.matrix())
    assert torch.allclose(found, wanted, atol=1e-6)
    assert part(x.double()).dtype == torch.float64


def test_its_magnitudes_keep_their_precision() -> None:
    part = made(Linear4(64, 32))
    whole = part.matrix()
    loaded = assemble(part.spec, disassemble(part), dtype=torch.bfloat16)
    assert isinstance(loaded, Linear4Part)
    assert loaded.bias is not None
    assert loaded.bias.dtype == torch.bfloat16
    assert torch.equal(loaded.matrix(), whole)
    assert torch.equal(part.half().matrix(), whole)


def test_what_can_not_be_held() -> None:
    with pytest.raises(SpecError, match="block must be a power of two and at least 32, not 48"):
        Linear4(64, 64, block=48)
    with pytest.raises(WeightsError, match="values that are no numbers"):
        Linear4(4, 2).held(torch.tensor([[1.0, 2, 3, float("nan")]] * 2))


def test_forms_know_each_other() -> None:
    four, plain = Linear4(8, 5), Linear(8, 5)
    assert four.holds_as(four.replace(bias=False))
    assert not four.holds_as(four.replace(form="fp4"))
    assert not four.holds_as(plain)
    assert not plain.holds_as(four)
    matrix = torch.randn(5, 8)
    assert torch.equal(plain.matrix(plain.held(matrix)), matrix)
