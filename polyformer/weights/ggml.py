"""The formats in which ggml stores weights: small whole numbers in blocks with a scale, and how they become tensors.

A block holds 32 or 256 weights. In the plain quantisations (Q4_0 to Q8_0) it has one scale, and perhaps an offset; in
the K-quantisations it is cut into 8 or 16 groups whose scales are again small whole numbers, times one scale of the
block. The layouts are those of ggml's `ggml-quants.h`. Formats that few files use are read by the package `gguf`.

Every product here is exact in float32 (11 bits of a half times at most 12), so that only the addition of an offset
rounds, and any order of the steps gives the same bits.

In comments: n blocks, k bytes.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from polyformer.errors import WeightsError

CHUNK = 2**16
"""Weights that are converted at a time: few enough to stay in the cache, so that temporary memory is a few MB."""

Read = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Format:
    """One of ggml's types: its number in a file, the weights and the bytes of a block, and what reads blocks.

    `read` takes the bytes of blocks [n, k] to floating-point numbers [n, ...], all the weights of a block in a row.
    `dtype` is that of the formats which hold ordinary numbers.
    """

    name: str
    code: int
    weights: int
    bytes: int
    read: Read
    dtype: torch.dtype | None = None

    @property
    def as_it_is(self) -> torch.dtype | None:
        """The dtype of a tensor that needs no conversion, float32 or whole numbers; None for all others."""
        plain = self.dtype == torch.float32 or (self.dtype is not None and not self.dtype.is_floating_point)
        return self.dtype if plain else None

    def size(self, shape: tuple[int, ...]) -> int | None:
        """Return the bytes of a tensor, or None if its rows are not made of whole blocks."""
        row = shape[-1] if shape else 1
        return None if row % self.weights else math.prod(shape) // self.weights * self.bytes


def dequantise(
    kind: Format,
    data: Tensor,
    shape: tuple[int, ...],
    dtype: torch.dtype = torch.float32,
    spent: Callable[[int], None] = lambda count: None,
) -> Tensor:
    """Return the tensor that blocks stand for.

    Args:
        data: its bytes, uint8 [kind.size(shape)].
        dtype: of the result; each chunk is rounded to it from float32, which never exists as a whole.
        spent: told, now and then, how many bytes from the start won't be looked at again.
    Raises:
        WeightsError: a format that the package `gguf` reads, which is not installed.
    """
    found = torch.empty(shape, dtype=dtype, device="cpu")
    blocks, rows = data.view(-1, kind.bytes), found.view(-1, kind.weights)
    step = max(1, CHUNK // kind.weights)
    for first in range(0, len(blocks), step):
        chunk = blocks[first : first + step]
        rows[first : first + step] = kind.read(chunk).view(len(chunk), -1)
        spent((first + len(chunk)) * kind.bytes)
    return found


# ---------------------------------------------------------------------------------------------------------------
# Reading blocks


def _half(blocks: Tensor, place: int) -> Tensor:
    """The 16-bit float at a byte of each block: float32 [n, 1]."""
    return blocks.view(torch.float16)[:, place // 2, None].float()


def _fields(packed: Tensor, bits: int) -> Tensor:
    """Bytes [..., k] to [..., 8 / bits, k]: the lowest bits of each byte, then the next ones."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device="cpu")
    found: Tensor = (packed.unsqueeze(-2) >> shifts[:, None]) & (2**bits - 1)
    return found


def _grouped(numbers: Tensor, scales: Tensor, offsets: Tensor | None = None) -> Tensor:
    """scale · number + offset: numbers [n, ...] in as many groups as there are scales [n, groups]."""
    found = numbers.reshape(*scales.shape, -1).float()
    found *= scales[..., None]
    if offsets is not None:
        found += offsets[..., None]
    return found


def _signed(numbers: Tensor, zero: int) -> Tensor:
    return numbers.view(torch.int8) - zero


def _q4_0(blocks: Tensor) -> Tensor:
    return _grouped(_signed(_fields(blocks[:, 2:], 4), 8), _half(blocks, 0))


def _q4_1(blocks: Tensor) -> Tensor:
    return _grouped(_fields(blocks[:, 4:], 4), _half(blocks, 0), _half(blocks, 2))


def _five_bits(low: Tensor, high: Tensor) -> Tensor:
    """Weight i of 32 has its low bits in byte i mod 16 of `low` and its highest in bit i mod 8 of `high`'s i // 8."""
    bits = (high.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8, device="cpu")) & 1
    return _fields(low, 4).flatten(1) | bits.flatten(1) << 4


def _q5_0(blocks: Tensor) -> Tensor:
    return _grouped(_signed(_five_bits(blocks[:, 6:], blocks[:, 2:6]), 16), _half(blocks, 0))


def _q5_1(blocks: Tensor) -> Tensor:
    return _grouped(_five_bits(blocks[:, 8:], blocks[:, 4:8]), _half(blocks, 0), _half(blocks, 2))


def _q8_0(blocks: Tensor) -> Tensor:
    return _grouped(blocks.view(torch.int8)[:, 2:], _half(blocks, 0))


def _q2_k(blocks: Tensor) -> Tensor:
    scales, low = blocks[:, :16], blocks[:, 16:80].view(-1, 2, 32)
    offsets = -_half(blocks, 82) * (scales >> 4)
    return _grouped(_fields(low, 2), _half(blocks, 80) * (scales & 15), offsets)


def _q3_k(blocks: Tensor) -> Tensor:
    high, low, packed = blocks[:, :32], blocks[:, 32:96].view(-1, 2, 32), blocks[:, 96:108]
    numbers = _fields(low, 2).flatten(1) | _fields(high, 1).flatten(1) << 2
    scales = _fields(packed[:, :8], 4).flatten(1) | _fields(packed[:, 8:], 2).flatten(1) << 4
    return _grouped(_signed(numbers, 4), _half(blocks, 108) * _signed(scales, 32))


def _scales_and_offsets(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Those of Q4_K and Q5_K: 8 of each with 6 bits, [n, 8]. The first four of each have bytes of their own, whose
    two free bits, with four of the last bytes, make the others."""
    scales, offsets, rest = blocks[:, 4:16].view(-1, 3, 4).unbind(1)
    scales = torch.cat((scales & 63, (rest & 15) | (scales >> 6 << 4)), 1)
    offsets = torch.cat((offsets & 63, (rest >> 4) | (offsets >> 6 << 4)), 1)
    return _half(blocks, 0) * scales, -_half(blocks, 2) * offsets


def _q4_k(blocks: Tensor) -> Tensor:
    return _grouped(_fields(blocks[:, 16:].view(-1, 4, 32), 4), *_scales_and_offsets(blocks))


def _q5_k(blocks: Tensor) -> Tensor:
    high, low = blocks[:, 16:48], blocks[:, 48:].view(-1, 4, 32)
    numbers = _fields(low, 4).flatten(1) | _fields(high, 1).flatten(1) << 4
    return _grouped(numbers, *_scales_and_offsets(blocks))


def _q6_k(blocks: Tensor) -> Tensor:
    low, high = blocks[:, :128].view(-1, 2, 64), blocks[:, 128:192].view(-1, 2, 32)
    numbers = _fields(low, 4).flatten(1) | _fields(high, 2).flatten(1) << 4
    return _grouped(_signed(numbers, 32), _half(blocks, 208) * blocks.view(torch.int8)[:, 192:208])


def _by_package(name: str, blocks: Tensor) -> Tensor:
    try:
        from gguf import GGMLQuantizationType, quants
    except ImportError:
        raise WeightsError(f"weights stored as {name} are read by the package gguf: pip install gguf") from None
    row = blocks.contiguous().view(1, -1).numpy()
    return torch.from_numpy(quants.dequantize(row, GGMLQuantizationType[name])).view(len(blocks), -1)


def _plain(name: str, code: int, dtype: torch.dtype) -> Format:
    return Format(name, code, 1, dtype.itemsize, lambda blocks: blocks.view(dtype), dtype)


def _packaged(name: str, code: int, weights: int, size: int) -> Format:
    return Format(name, code, weights, size, functools.partial(_by_package, name))


_ALL = (
    _plain("F32", 0, torch.float32),
    _plain("F16", 1, torch.float16),
    _plain("BF16", 30, torch.bfloat16),
    _plain("F64", 28, torch.float64),
    _plain("I8", 24, torch.int8),
    _plain("I16", 25, torch.int16),
    _plain("I32", 26, torch.int32),
    _plain("I64", 27, torch.int64),
    Format("Q4_0", 2, 32, 18, _q4_0),
    Format("Q4_1", 3, 32, 20, _q4_1),
    Format("Q5_0", 6, 32, 22, _q5_0),
    Format("Q5_1", 7, 32, 24, _q5_1),
    Format("Q8_0", 8, 32, 34, _q8_0),
    Format("Q2_K", 10, 256, 84, _q2_k),
    Format("Q3_K", 11, 256, 110, _q3_k),
    Format("Q4_K", 12, 256, 144, _q4_k),
    Format("Q5_K", 13, 256, 176, _q5_k),
    Format("Q6_K", 14, 256, 210, _q6_k),
    _packaged("IQ2_XXS", 16, 256, 66),
    _packaged("IQ2_XS", 17, 256, 74),
    _packaged("IQ3_XXS", 18, 256, 98),
    _packaged("IQ1_S", 19, 256, 50),
    _packaged("IQ4_NL", 20, 32, 18),
    _packaged("IQ3_S", 21, 256, 110),
    _packaged("IQ2_S", 22, 256, 82),
    _packaged("IQ4_XS", 23, 256, 136),
    _packaged("IQ1_M", 29, 256, 56),
    _packaged("TQ1_0", 34, 256, 54),
    _packaged("TQ2_0", 35, 256, 66),
    _packaged("MXFP4", 39, 32, 17),
    _packaged("NVFP4", 40, 64, 36),
)

FORMATS = {kind.code: kind for kind in _ALL}
"""All formats by their number in a file. A new one is a new row above."""
