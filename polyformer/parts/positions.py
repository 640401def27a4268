"""Absolute positions that are combined with token embeddings. Without a `Position`, a model knows no order."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from polyformer.errors import SpecError
from polyformer.parts.part import Part, draw_normal
from polyformer.spec import Spec

if TYPE_CHECKING:
    from polyformer.parts.flow import Flow


class Position(Spec, abstract=True):
    """A vector of `width` for each place; `length` places at most (None: any number).

    The first place has the number `offset`: fairseq's models count from 2, as the padding token's number stands
    before.
    """

    width: int
    length: int | None = None
    offset: int = 0

    def check(self) -> None:
        self.require(self.width > 0, "width must be at least 1")
        self.require(self.offset >= 0, "offset can't be negative")
        self.require(self.length is None or self.length > 0, "length must be at least 1")


class Sinusoidal(Position):
    """PE(pos, 2i) = sin(pos / base^(2i/d)), PE(pos, 2i+1) = the cosine (Vaswani et al. 2017, section 3.5).

    `layout` says where they stand: sines and cosines alternate as in the paper, or all sines come first, as in
    tensor2tensor, fairseq and Marian. `spacing` says how the wavelengths are spaced: so that `base` would be reached
    at the index `width`, as in the paper, or by the last pair ("ends"), as in tensor2tensor and fairseq.
    """

    layout: Literal["interleaved", "halves"] = "interleaved"
    base: float = 10000.0
    spacing: Literal["paper", "ends"] = "paper"

    def module(self) -> Part:
        return SinusoidalPart(self)


class Table(Position):
    """Sinusoids held with the weights: a checkpoint's own table is used as it is and saved again, but never trained."""

    layout: Literal["interleaved", "halves"] = "interleaved"
    base: float = 10000.0
    spacing: Literal["paper", "ends"] = "paper"

    def check(self) -> None:
        super().check()
        self.require(self.length is not None, "a table of positions needs a length")

    def module(self) -> Part:
        return TablePart(self)


class Learned(Position):
    """A trained vector for each place (Gehring et al. 2017); places beyond `length` are an error."""

    def check(self) -> None:
        super().check()
        self.require(self.length is not None, "learned positions need a length")

    def module(self) -> Part:
        return LearnedPart(self)


class Axial(Position):
    """Trained vectors along axes: place i has those of its coordinates in a grid of `shape`, side by side.

    So few vectors are many places, 64 + 64 of them 64 · 64, as in Reformer's models (Kitaev et al. 2020). The last axis
    runs fastest. `widths` are those of the axes and make up `width`; `start` is the deviation that they are drawn with.
    In training, `dropout` drops all places that differ in the first coordinate only, together.

    Shorter sequences have the first places; one longer than the grid is an error.
    """

    shape: tuple[int, ...] = ()
    widths: tuple[int, ...] = ()
    start: float = 1.0
    dropout: float = 0.0

    def check(self) -> None:
        super().check()
        axes = len(self.shape) == len(self.widths) > 0 and min(*self.shape, *self.widths) > 0
        self.require(axes, f"shape {self.shape} and widths {self.widths} must have a number above 0 for each axis")
        made = f"widths {self.widths} make {sum(self.widths)} values, not {self.width}"
        self.require(sum(self.widths) == self.width, made)
        places = math.prod(self.shape)
        self.require(self.length in (None, places), f"a grid of {self.shape} has {places} places, not {self.length}")
        self.require(self.offset == 0, "the places of a grid are counted from 0")
        self.require(0 <= self.dropout < 1, f"dropout must be in [0, 1), not {self.dropout}")

    @classmethod
    def of_axes(cls, shape: tuple[int, ...], widths: tuple[int, ...]) -> Axial:
        """Return the positions of a grid."""
        return cls(sum(widths), shape=shape, widths=widths)

    def module(self) -> Part:
        return AxialPart(self)


class PositionPart(Part):
    """Gives vectors for `flow.positions`: [1 or B, S] -> [1 or B, S, width]."""

    length: int | None

    def refuse_beyond(self, positions: Tensor) -> int:
        """Return one more than the largest position; raise if there is no vector for it."""
        needed = int(positions.max()) + 1 if positions.numel() else 0
        if self.length is not None and needed > self.length:
            raise SpecError(
                f"a sequence of {needed} tokens is longer than the model's {self.length} positions; "
                "shorten it, or train with more positions"
            )
        return needed


class SinusoidalPart(PositionPart):
    """No weights: the table is computed, in double precision, as far as it has been needed."""

    def __init__(self, spec: Sinusoidal) -> None:
        super().__init__(spec)
        self.length = spec.length
        self.table: Tensor | None = None

    def forward(self, x: Tensor, flow: Flow) -> Tensor:
        needed = self.refuse_beyond(flow.positions)
        if self.table is None or len(self.table) < needed or self.table.device != x.device:
            rows = max(needed, 64) if self.table is None else max(needed, 2 * len(self.table))
            with torch.inference_mode(False):  # or a table made while translating could never be trained with
                self.table = self.rows(rows).to(x.device)
        return self.table[flow.positions].to(x.dtype)

    def rows(self, rows: int) -> Tensor:
        """Return the vectors of the first so many places: [rows, width]."""
        spec = self.spec
        assert isinstance(spec, Sinusoidal)
        pairs = -(-spec.width // 2)
        step = 1 / max(pairs - 1, 1) if spec.spacing == "ends" else 2 / spec.width
        exponents = torch.arange(pairs, dtype=torch.float64, device="cpu") * (-step * math.log(spec.base))
        numbers = torch.arange(spec.offset, spec.offset + rows, dtype=torch.float64, device="cpu")
        angles = numbers[:, None] * exponents.exp()
        if spec.layout == "interleaved":
            table = torch.stack((angles.sin(), angles.cos()), -1).flatten(1)
        else:
            table = torch.cat((angles.sin(), angles.cos()[:, : spec.width // 2]), 1)
        return table[:, : spec.width].float()


class TablePart(PositionPart):
    """Holds the table [length, width] as a buffer."""

    weight: Tensor

    def __init__(self, spec: Table) -> None:
        super().__init__(spec)
        assert spec.length is not None
        self.length = spec.length
        waves = Sinusoidal(spec.width, spec.length, spec.offset, spec.layout, spec.base, spec.spacing)
        table = torch.empty(spec.length, spec.width)
        self.register_buffer("weight", table if table.is_meta else SinusoidalPart(waves).rows(spec.length).to(table))

    def forward(self, x: Tensor, flow: Flow) -> Tensor:
        self.refuse_beyond(flow.positions)
        return self.weight[flow.positions]


class LearnedPart(PositionPart):
    """Holds the table [offset + length, width]; its first `offset` rows are never read."""

    def __init__(self, spec: Learned) -> None:
        super().__init__(spec)
        assert spec.length is not None
        self.length, self.offset = spec.length, spec.offset
        self.weight = nn.Parameter(torch.empty(spec.offset + spec.length, spec.width))
        draw_normal(self.weight, 0.02)

    def forward(self, x: Tensor, flow: Flow) -> Tensor:
        self.refuse_beyond(flow.positions)
        return self.weight[flow.positions + self.offset]


class AxialPart(PositionPart):
    """Holds a table [shape[i], widths[i]] for each axis: `axis_0`, `axis_1`, …"""

    def __init__(self, spec: Axial) -> None:
        super().__init__(spec)
        self.length, self.shape, self.dropout = math.prod(spec.shape), spec.shape, spec.dropout
        for axis, size in enumerate(zip(spec.shape, spec.widths, strict=True)):
            table = nn.Parameter(torch.empty(size))
            self.register_parameter(f"axis_{axis}", table)
            draw_normal(table, spec.start)

    def forward(self, x: Tensor, flow: Flow) -> Tensor:
        self.refuse_beyond(flow.positions)
        found, unit = [], math.prod(self.shape)
        for table, places in zip(self.parameters(), self.shape, strict=True):
            unit //= places
            found.append(table[flow.positions // unit % places])
        vectors = torch.cat(found, -1)
        if not self.training or not self.dropout:
            return vectors
        columns = math.prod(self.shape[1:])
        kept = torch.rand(len(x), columns, device=x.device) >= self.dropout
        kept = kept.gather(1, (flow.positions % columns).expand(len(x), -1))
        return vectors * (kept.to(vectors.dtype) / (1 - self.dropout))[..., None]
