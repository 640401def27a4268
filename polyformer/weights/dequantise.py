"""How ggml's blocks become tensors. The layouts are those of ggml's `ggml-quants.h`.

Every product here is exact in float32 (11 bits of a half times at most 12), so that only the addition of an offset
rounds, and any order of the steps gives the same bits. Formats that few files use are read by the package `gguf`.

In comments: n blocks, k bytes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from polyformer.errors import WeightsError
from polyformer.weights.ggml import Format

CHUNK = 2**16
"""Weights that are converted at a time: few enough to stay in the cache, so that temporary memory is a few MB."""


def as_it_is(kind: Format) -> torch.dtype | None:
    """Return the dtype of a tensor that needs no conversion, float32 or whole numbers; None for all others."""
    found = _dtype(kind)
    plain = found == torch.float32 or (found is not None and not found.is_floating_point)
    return found if plain else None


def _dtype(kind: Format) -> torch.dtype | None:
    """Return the dtype of a format that holds ordinary numbers."""
    found: torch.dtype | None = None if kind.plain is None else getattr(torch, kind.plain)
    return found


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
    read = _reader(kind)
    found = torch.empty(shape, dtype=dtype, device="cpu")
    blocks, rows = data.view(-1, kind.bytes), found.view(-1, kind.weights)
    step = max(1, CHUNK // kind.weights)
    for first in range(0, len(blocks), step):
        chunk = blocks[first : first + step]
        rows[first : first + step] = read(chunk).view(len(chunk), -1)
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


READERS: dict[str, Callable[[Tensor], Tensor]] = {
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q8_0": _q8_0,
    "Q2_K": _q2_k,
    "Q3_K": _q3_k,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
}
"""What takes the bytes of blocks [n, k] to floating-point numbers [n, ...], all the weights of a block in a row."""


def _reader(kind: Format) -> Callable[[Tensor], Tensor]:
    dtype = _dtype(kind)
    if dtype is not None:
        return lambda blocks: blocks.view(dtype)
    return READERS.get(kind.name) or functools.partial(_by_package, kind.name)
