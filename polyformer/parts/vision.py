"""Images as rows: patches, trained rows before them, and positions on a grid.

Shape letters: B batch, C channels, S rows, D width, P values of a patch (C · its height · its width).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from polyformer.errors import SpecError
from polyformer.parts.flow import start_flow
from polyformer.parts.inputs import Given, InputPart
from polyformer.parts.linear import Affine
from polyformer.parts.part import Part, draw_normal
from polyformer.spec import Spec

if TYPE_CHECKING:
    from polyformer.parts.flow import Flow


class Token(Spec):
    """A trained row that stands before the patches: [CLS], or DeiT's distillation token."""

    width: int

    def check(self) -> None:
        self.require(self.width > 0, "width must be at least 1")

    def module(self) -> Part:
        return TokenPart(self)


class GridPositions(Spec):
    """A trained vector for each place of a grid (height, width), and for each of `before` rows that precede it.

    For an image of another size, the grid's vectors are taken for an image themselves and resized by bicubic
    interpolation, so that each patch has the position of its place in the picture (Dosovitskiy et al. 2021, section
    3.2).
    """

    width: int
    grid: tuple[int, int]
    before: int = 0

    def check(self) -> None:
        self.require(min(self.width, *self.grid) > 0, "width and both sides of the grid must be at least 1")
        self.require(self.before >= 0, "before can't be negative")

    def module(self) -> Part:
        return GridPositionsPart(self)


class Patches(Spec):
    """An image cut into patches (height, width), each projected to one row: dropout(positions + [tokens; norm(rows)]).

    The published models' convolution, whose stride is its kernel's size, is this same projection of each patch
    (Dosovitskiy et al. 2021, equation 1). `edge` says what becomes of an image that is no whole number of patches:
    it is refused, what is left over at the right and the bottom is cut off, or zeros fill the last patches up.
    """

    patch: tuple[int, int]
    channels: int
    project: Spec
    tokens: tuple[Token, ...] = ()
    positions: Spec | None = None
    norm: Spec | None = None
    dropout: Spec | None = None
    edge: Literal["refuse", "crop", "pad"] = "refuse"

    def check(self) -> None:
        self.require(min(self.channels, *self.patch) > 0, "channels and both sides of a patch must be at least 1")
        if isinstance(self.project, Affine):
            values = self.channels * self.patch[0] * self.patch[1]
            told = f"a patch has {values} values, but the projection takes {self.project.inputs}"
            self.require(self.project.inputs == values, told)

    def module(self) -> Part:
        return PatchesPart(self)


class TokenPart(Part):
    """rows [B, S, D] -> [B, 1, D]."""

    def __init__(self, spec: Token) -> None:
        super().__init__(spec)
        self.weight = nn.Parameter(torch.empty(spec.width))
        draw_normal(self.weight, 0.02)

    def forward(self, x: Tensor, flow: Flow) -> Tensor:
        return self.weight.expand(len(x), 1, -1)


class GridPositionsPart(Part):
    """`flow.grid` -> [1, S, D]. Holds the table [before + height · width, D], the grid row by row."""

    def __init__(self, spec: GridPositions) -> None:
        super().__init__(spec)
        self.grid, self.before = spec.grid, spec.before
        self.weight = nn.Parameter(torch.empty(spec.before + spec.grid[0] * spec.grid[1], spec.width))
        draw_normal(self.weight, 0.02)

    def forward(self, x: Tensor, flow: Flow) -> Tensor:
        if flow.grid is None:
            raise SpecError("positions on a grid need rows that are patches of an image")
        if flow.grid == self.grid:
            return self.weight[None]
        before, places = self.weight[: self.before], self.weight[self.before :]
        picture = places.view(1, *self.grid, -1).permute(0, 3, 1, 2).float()
        resized = F.interpolate(picture, flow.grid, mode="bicubic", align_corners=False)
        return torch.cat((before, resized[0].flatten(1).T.to(before.dtype)))[None]


class PatchesPart(InputPart):
    """pixels [B, C, height, width] -> [B, S, D]; row 0 is the first of `tokens`, or the upper left patch."""

    main = "pixel_values"
    project: Part
    tokens: nn.ModuleList
    positions: Part | None
    norm: Part | None
    dropout: Part | None

    def __init__(self, spec: Patches) -> None:
        super().__init__(spec)
        self.patch, self.channels, self.edge = spec.patch, spec.channels, spec.edge

    def begin(self, given: Given) -> Flow:
        shape = list(given.input.shape)
        if len(shape) != 4 or shape[1] != self.channels or not given.input.is_floating_point():
            told = f"pixel_values is of {given.input.dtype} and shape {shape}"
            raise SpecError(f"{told}; this model needs floats [batch, {self.channels}, height, width]")
        grid = self._grid(shape[2], shape[3])
        rows = given.input.new_empty((shape[0], len(self.tokens) + grid[0] * grid[1], 0))
        flow = start_flow(rows, given.mask, given.documents, given.cache)
        flow.grid, flow.inputs = grid, dict(given.others)
        return flow

    def forward(self, x: Tensor, flow: Flow) -> Tensor:
        assert flow.grid is not None
        x = self.project(self._cut(x.to(self.precision), flow.grid), flow)
        x = x if self.norm is None else self.norm(x, flow)
        if self.tokens:
            x = torch.cat((*(token(x, flow) for token in self.tokens), x), 1)
        if self.positions is not None:
            x = x + self.positions(x, flow)
        return x if self.dropout is None else self.dropout(x, flow)

    def _grid(self, height: int, width: int) -> tuple[int, int]:
        """Return how many patches stand below and beside each other."""
        down, across = self.patch
        if self.edge == "refuse" and (height % down or width % across):
            whole = f"not made of patches of {down} x {across}"
            raise SpecError(f"an image of {height} x {width} pixels is {whole}; resize it to a multiple of them")
        if self.edge == "pad":
            return -(-height // down), -(-width // across)
        if height < down or width < across:
            raise SpecError(f"an image of {height} x {width} pixels is smaller than a patch of {down} x {across}")
        return height // down, width // across

    def _cut(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """[B, C, height, width] -> [B, patches, P]."""
        (height, width), (down, across) = grid, self.patch
        right, bottom = width * across - x.shape[3], height * down - x.shape[2]
        if right > 0 or bottom > 0:
            x = F.pad(x, (0, max(right, 0), 0, max(bottom, 0)))
        x = x[:, :, : height * down, : width * across].reshape(len(x), self.channels, height, down, width, across)
        return x.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
