"""ggml's formats: bit for bit what the package `gguf` makes of the same bytes, in any dtype and chunk."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from polyformer.errors import WeightsError
from polyformer.weights import dequantise as converting
from polyformer.weights.dequantise import dequantise
from polyformer.weights.ggml import FORMATS, Format
from tests.weights.gguf_writer import FORMAT, HALVES, random_blocks

PACKAGED = [kind.name for kind in FORMATS.values() if kind.plain is None and kind.name not in HALVES]
PLAIN = [kind.name for kind in FORMATS.values() if kind.plain is not None]


def bits(tensor: Tensor) -> list[int]:
    found: list[int] = tensor.contiguous().view({2: torch.int16, 4: torch.int32}[tensor.itemsize]).flatten().tolist()
    return found


def by_package(kind: Format, blocks: Tensor) -> Tensor:
    gguf = pytest.importorskip("gguf")
    with np.errstate(all="ignore"):
        found = gguf.quants.dequantize(blocks.numpy(), gguf.GGMLQuantizationType[kind.name])
    return torch.from_numpy(found)


@pytest.mark.parametrize("name", HALVES)
def test_our_formats_are_the_packages_bit_for_bit(name: str) -> None:
    kind = FORMAT[name]
    blocks = random_blocks(kind, 3 * 5)
    found = dequantise(kind, blocks.flatten(), (3, 5 * kind.weights))
    assert found.shape == (3, 5 * kind.weights)
    assert bits(found) == bits(by_package(kind, blocks))


@pytest.mark.parametrize("name", HALVES)
def test_extreme_scales_and_numbers(name: str) -> None:
    kind = FORMAT[name]
    blocks = torch.tensor([0, 255, 0x80, 0x7F, 0x0F, 0xF0], dtype=torch.uint8).repeat_interleave(6)[:, None]
    blocks = blocks.repeat(1, kind.bytes)
    halves = torch.tensor([0.0, -0.0, 65504.0, -65504.0, 2.0**-24, -1.5]).half().repeat(6)
    for place in HALVES[name]:
        blocks[:, place : place + 2] = halves[:, None].view(torch.uint8)
    found = dequantise(kind, blocks.flatten(), (36, kind.weights))
    assert bits(found) == bits(by_package(kind, blocks))


@pytest.mark.parametrize("name", PACKAGED)
def test_rare_formats_go_through_the_package(name: str) -> None:
    kind = FORMAT[name]
    blocks = random_blocks(kind, 7)
    wanted = by_package(kind, blocks)
    with np.errstate(all="ignore"):
        found = dequantise(kind, blocks.flatten(), (7, kind.weights))
    assert bits(found) == bits(wanted)


@pytest.mark.parametrize("name", [*HALVES, *PACKAGED])
def test_sizes_are_the_packages(name: str) -> None:
    gguf = pytest.importorskip("gguf")
    kind = FORMAT[name]
    assert gguf.GGMLQuantizationType[name] == kind.code
    assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]] == (kind.weights, kind.bytes)


def test_nothing_that_the_package_reads_is_missing() -> None:
    gguf = pytest.importorskip("gguf")
    readable = {kind.name for kind in gguf.quants._type_traits} | {"F32", "F16"}
    assert readable <= set(FORMAT)


def test_without_the_package_the_format_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(WeightsError, match="stored as IQ4_NL are read by the package gguf: pip install gguf"):
        dequantise(FORMAT["IQ4_NL"], torch.zeros(18, dtype=torch.uint8), (32,))


def one_block(kind: str, halves: list[float], content: list[int]) -> Tensor:
    """Scales and whatever bytes follow."""
    scales = torch.tensor(halves).half().view(torch.uint8)
    return torch.cat((scales, torch.tensor(content, dtype=torch.uint8)))


LOW, HIGH = [i % 16 for i in range(16)], [(7 * i) % 16 for i in range(16)]
NIBBLES = [low | high << 4 for low, high in zip(LOW, HIGH, strict=True)]
BIT = [(i * i) % 3 == 1 for i in range(32)]
BITS = [sum(BIT[8 * byte + i] << i for i in range(8)) for byte in range(4)]
BY_HAND: dict[str, tuple[list[float], list[int], list[float]]] = {
    "Q4_0": ([0.5], NIBBLES, [0.5 * (q - 8) for q in LOW + HIGH]),
    "Q4_1": ([0.5, -3.0], NIBBLES, [0.5 * q - 3 for q in LOW + HIGH]),
    "Q5_0": ([0.5], BITS + NIBBLES, [0.5 * (q + 16 * b - 16) for q, b in zip(LOW + HIGH, BIT, strict=True)]),
    "Q5_1": ([0.5, -3.0], BITS + NIBBLES, [0.5 * (q + 16 * b) - 3 for q, b in zip(LOW + HIGH, BIT, strict=True)]),
    "Q8_0": ([0.25], [(9 * i) % 256 for i in range(32)], [0.25 * ((9 * i + 128) % 256 - 128) for i in range(32)]),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_blocks_made_by_hand(name: str) -> None:
    halves, content, wanted = BY_HAND[name]
    assert dequantise(FORMAT[name], one_block(name, halves, content), (32,)).tolist() == wanted


@pytest.mark.parametrize("name", PLAIN)
def test_plain_numbers(name: str) -> None:
    kind = FORMAT[name]
    assert kind.plain is not None
    numbers = torch.tensor([[1, -2, 3], [4, 5, -6]], dtype=getattr(torch, kind.plain or ""))
    found = dequantise(kind, numbers.view(torch.uint8).flatten(), (2, 3))
    assert found.dtype == torch.float32
    assert found.tolist() == numbers.tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("chunk", [1, 512, 2**18])
def test_chunks_and_dtypes_change_nothing(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, chunk: int) -> None:
    for name in HALVES:
        blocks = random_blocks(FORMAT[name], 11)
        whole = dequantise(FORMAT[name], blocks.flatten(), (11, FORMAT[name].weights))
        monkeypatch.setattr(converting, "CHUNK", chunk)
        spent: list[int] = []
        found = dequantise(FORMAT[name], blocks.flatten(), (11, FORMAT[name].weights), dtype, spent.append)
        monkeypatch.undo()
        assert found.dtype == dtype
        assert found.equal(whole.to(dtype))
        assert spent == sorted(spent)
        assert spent[-1] == blocks.numel()
        assert len(spent) == math.ceil(11 / max(1, chunk // FORMAT[name].weights))


@pytest.mark.parametrize(
    ("name", "shape", "size"),
    [("Q4_0", (3, 64), 108), ("Q4_0", (3, 33), None), ("Q6_K", (256,), 210), ("Q6_K", (256, 1), None), ("F32", (), 4)],
)
def test_rows_are_made_of_whole_blocks(name: str, shape: tuple[int, ...], size: Any) -> None:
    assert FORMAT[name].size(shape) == size
