"""Numbers as codes: blocks of them divided by their largest magnitude, each then named by the nearest of a few levels.

Four bits: NF4, whose levels are quantiles of a normal distribution, and FP4 (Dettmers et al. 2023, section 3). Eight
bits: the dynamic map, whose levels lie closest together near 0 (Dettmers et al. 2022, section 1.3). Codes and scales
are those that bitsandbytes' GPU kernels and its implementation in PyTorch make, bit for bit; its CPU kernels since
0.49 round to one of 65536 even steps before they look for the nearest of 256 levels, which these here don't.
"""

from __future__ import annotations

import functools
from typing import Literal

import torch
from torch import Tensor

Form = Literal["nf4", "fp4"]

_NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
_FP4 = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)
"""By their bits: two of exponent, one of mantissa; a fourth is the sign."""

_TINY = 1e-38


@functools.cache
def levels(form: Form) -> Tensor:
    """Return what the sixteen codes stand for [16], in [-1, 1] and float32; in FP4 they are not in order."""
    values = _NF4 if form == "nf4" else (*_FP4, *(-one for one in _FP4))
    found = torch.tensor(values, dtype=torch.float32, device="cpu")
    return found / found.abs().max()


@functools.cache
def dynamic_map(signed: bool = True) -> Tensor:
    """Return what the 256 codes of the dynamic map stand for, in order: [256], float32.

    Between 0.1 and 1 there are 64 (128 without a sign) evenly spread levels; between 0.01 and 0.1 half as many, and so
    on through seven decades; and 0 and 1 themselves.
    """
    found = [0.0, 1.0]
    for i in range(7):
        edges = torch.linspace(0.1, 1, 2 ** (i if signed else i + 1) + 1, dtype=torch.float32, device="cpu")
        middles = (edges[:-1] + edges[1:]) / 2
        scale = 10 ** (i - 6)
        found += (scale * middles).tolist()
        found += (-scale * middles).tolist() if signed else []
    return torch.tensor(sorted(found), dtype=torch.float32, device="cpu")


@functools.cache
def pairs(form: Form) -> Tensor:
    """Return for each byte the two numbers that it stands for, the upper four bits first: float32 bits, int64 [256].

    One gather of eight bytes is several times as quick as one of a row of two numbers.
    """
    byte = torch.arange(256, device="cpu")
    both = torch.stack((levels(form)[byte >> 4], levels(form)[byte & 15]), -1)
    return both.view(torch.int64).view(-1)


def in_blocks(x: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Divide each run of `block` numbers of x [n] by its largest magnitude: [n] in [-1, 1], magnitudes [⌈n/block⌉].

    A last block may be shorter. It is divided where others are multiplied by the reciprocal, as the peer does.
    """
    x = x.float()
    whole = len(x) // block * block
    rows, rest = x[:whole].view(-1, block), x[whole:]
    largest = rows.abs().amax(1)
    scaled = (rows * (1.0 / largest.clamp(min=_TINY))[:, None]).clamp_(-1, 1).view(-1)
    if len(rest):
        own = rest.abs().max().clamp(min=_TINY)
        scaled = torch.cat((scaled, (rest / own).clamp_(-1, 1)))
        largest = torch.cat((largest, own[None]))
    return scaled, largest


def to_bytes(x: Tensor, block: int, signed: bool = True) -> tuple[Tensor, Tensor]:
    """Return codes of the dynamic map uint8 [n] for x [n], and the magnitude of each block [⌈n/block⌉]."""
    scaled, largest = in_blocks(x, block)
    table = dynamic_map(signed).to(x.device)
    return torch.bucketize(scaled, (table[:-1] + table[1:]) / 2, out_int32=True).to(torch.uint8), largest


def from_bytes(codes: Tensor, largest: Tensor, block: int, signed: bool = True) -> Tensor:
    """Return the numbers [n], float32, that codes of the dynamic map stand for."""
    table = dynamic_map(signed).to(codes.device)
    found = table.index_select(0, codes.int())
    whole = len(codes) // block
    found[: whole * block].view(-1, block).mul_(largest[:whole, None])
    if whole < len(largest):
        found[whole * block :] *= largest[whole]
    return found


def to_halves(x: Tensor, block: int, form: Form) -> tuple[Tensor, Tensor]:
    """Return two codes a byte, the first in the upper half: uint8 [⌈n/2⌉] for x [n]; and magnitudes [⌈n/block⌉]."""
    scaled, largest = in_blocks(x, block)
    if len(scaled) % 2:
        scaled = torch.cat((scaled, scaled.new_zeros(1)))
    order = torch.argsort(levels(form))
    ordered = levels(form)[order]
    places = torch.bucketize(scaled, ((ordered[:-1] + ordered[1:]) / 2).to(x.device), out_int32=True)
    codes = order.to(torch.uint8).to(x.device).index_select(0, places)
    return codes[::2] << 4 | codes[1::2], largest
