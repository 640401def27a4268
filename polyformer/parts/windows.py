"""Attention within windows of a grid of rows, its relative positions, and the merging of patches (Swin).

Shape letters: B batch, S rows, D width, H heads, E head width, W windows of an image, N rows of a window.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from polyformer.errors import SpecError
from polyformer.parts.attention import Attention
from polyformer.parts.bias import Bias, by_head
from polyformer.parts.contract import Clause, Refuses, Term
from polyformer.parts.flow import Flow
from polyformer.parts.linear import Linear
from polyformer.parts.norms import LayerNorm
from polyformer.parts.part import Part, draw_normal
from polyformer.parts.places import as_scores
from polyformer.parts.relative import RelativePart, RelativePosition
from polyformer.parts.rules import SameDocument
from polyformer.parts.view import View
from polyformer.spec import Spec

ON_A_GRID: Mapping[Clause, Term] = {
    "cached": Refuses("it needs all rows of a grid at once"),
    "packed": Refuses("the rows of a grid are one picture"),
    "padded on the right": Refuses("all rows of a grid are real"),
    "padded on the left": Refuses("all rows of a grid are real"),
}


class Windows(Spec):
    """An op on the rows of each `window` x `window` square of the grid by itself (Liu et al. 2021, section 3.2).

    With a `shift`, the grid is first rolled that far up and to the left, so that windows of alternating layers
    overlap. A window that the roll made of rows from opposite edges is kept apart as packed documents are: the
    attention in it must see `SameDocument`.

    A grid that windows don't cover evenly is filled up with rows of zeros, which are looked at like others (as they
    are in the published models). A grid with a side no longer than a window has windows of that side, unshifted.
    """

    op: Spec
    window: int
    shift: int = 0

    def check(self) -> None:
        self.require(self.window > 0, "window must be at least 1")
        self.require(0 <= self.shift < self.window, f"shift must be in [0, {self.window}), not {self.shift}")
        if self.shift and isinstance(self.op, Attention):
            apart = self.op.see & SameDocument() == self.op.see
            self.require(apart, "in shifted windows, attention must see SameDocument only")

    def breaks(self) -> Mapping[Clause, Term]:
        return ON_A_GRID

    def module(self) -> Part:
        return WindowsPart(self)


class GridBias(RelativePosition):
    """A trained scalar for each head and offset on a grid, added to the scores (Liu et al. 2021, equation 4).

    Offsets reach up to `height` - 1 rows and `width` - 1 columns; those beyond take the nearest one's. Rows before
    the grid ([CLS]) have no bias. A text is a grid of one row.
    """

    heads: int
    height: int
    width: int

    def check(self) -> None:
        self.require(min(self.heads, self.height, self.width) > 0, "heads, height and width must be at least 1")

    def module(self) -> Part:
        return GridBiasPart(self)


class PatchMerging(Spec):
    """Each 2 x 2 neighbouring rows become one: project(norm([four rows])) (Liu et al. 2021, section 3.1).

    A grid with an odd side is filled up with zeros.
    """

    norm: Spec
    project: Spec

    @classmethod
    def of_width(cls, width: int) -> PatchMerging:
        """Return the published form, which doubles the width."""
        return cls(LayerNorm(4 * width), Linear(4 * width, 2 * width, bias=False))

    def breaks(self) -> Mapping[Clause, Term]:
        return ON_A_GRID

    def module(self) -> Part:
        return PatchMergingPart(self)


class WindowsPart(Part):
    """x [B, S, D] -> [B, S, D], for rows that are a grid."""

    op: Part

    def __init__(self, spec: Windows) -> None:
        super().__init__(spec)
        self.window, self.shift = spec.window, spec.shift

    def forward(self, x: Tensor, flow: Flow) -> Tensor:
        self.agree(flow)
        height, width = _grid_of(x, flow)
        window = min(self.window, height, width)
        shift = self.shift if window < min(height, width) else 0
        x = _padded(x.view(len(x), height, width, -1), window)
        batch, down, across, _ = x.shape
        x = x if not shift else x.roll((-shift, -shift), (1, 2))
        inner = flow.once(
            ("windows", batch, down, across, window, shift),
            lambda: flow_within((batch, down, across), window, shift, x),
        )
        inner.path, inner.trace = flow.path, flow.trace
        x = self.op(_cut(x, window), inner)
        x = x.view(batch, down // window, across // window, window, window, -1).transpose(2, 3)
        x = x.reshape(batch, down, across, -1)
        x = x if not shift else x.roll((shift, shift), (1, 2))
        return x[:, :height, :width].reshape(batch, height * width, -1)


class GridBiasPart(RelativePart):
    """Holds the table [(2 · height - 1) · (2 · width - 1), heads]."""

    def __init__(self, spec: GridBias) -> None:
        super().__init__(spec)
        self.reach = (spec.height - 1, spec.width - 1)
        self.weight = nn.Parameter(torch.empty((2 * spec.height - 1) * (2 * spec.width - 1), spec.heads))
        draw_normal(self.weight, 0.02)

    def bias(self, q_BHSE: Tensor, flow: Flow) -> Bias:
        view = flow.view
        offsets = flow.once(("grid offsets", self.reach), lambda: Offsets(view, flow.grid, self.reach))
        return ByOffset(view, (self.weight.T.to(q_BHSE.dtype),), offsets)


@dataclass
class Offsets:
    """Which row of a table says how queries and keys stand to each other on a grid; made once for all layers.

    Attributes:
        view: the last of its keys are the grid.
        grid: height and width; None is one row of all keys.
        reach: the furthest that rows and columns are told apart.
    """

    view: View
    grid: tuple[int, int] | None
    reach: tuple[int, int]
    _found: Tensor | None = None

    def among(self, queries: Tensor, keys: Tensor) -> Tensor:
        """Return rows of the table [b, h, ..., s, k]: the one behind its last where a place is before the grid."""
        height, width = self.grid or (1, self.view.keys)
        asking, asked = (as_scores(one) - (self.view.keys - height * width) for one in (queries, keys))
        down, across = self.reach
        rows = (asking // width - asked // width).clamp(-down, down) + down
        columns = (asking % width - asked % width).clamp(-across, across) + across
        none = (2 * down + 1) * (2 * across + 1)
        return torch.where((asking < 0) | (asked < 0), none, rows * (2 * across + 1) + columns)

    def all(self) -> Tensor:
        """Return those of all queries and keys: [1, 1, S, K]."""
        if self._found is None:
            keys = self.view.keys
            self._found = self.among(*self.view.pairs(range(keys - self.view.queries, keys), range(keys)))
        return self._found


@dataclass
class ByOffset(Bias):
    """A number for each head and offset on a grid; `sources` is a table [H, offsets]."""

    offsets: Offsets

    def among(self, queries: Tensor, keys: Tensor) -> Tensor:
        return self.laid_out(self.offsets.among(queries, keys))

    def whole(self) -> Tensor:
        return self.laid_out(self.offsets.all())

    def laid_out(self, index: Tensor) -> Tensor:
        """Look up offsets [b, h, ..., s, k] -> [b, H, ..., s, k]."""
        return by_head(F.pad(self.sources[0], (0, 1)), index)


class PatchMergingPart(Part):
    """x [B, height · width, D] -> [B, ⌈height / 2⌉ · ⌈width / 2⌉, D']; `flow` then tells of the new rows."""

    norm: Part
    project: Part

    def forward(self, x: Tensor, flow: Flow) -> Tensor:
        self.agree(flow)
        height, width = _grid_of(x, flow)
        x = _padded(x.view(len(x), height, width, -1), 2)
        grid = (x.shape[1] // 2, x.shape[2] // 2)
        x = x.view(len(x), grid[0], 2, grid[1], 2, -1).permute(0, 1, 3, 4, 2, 5)  # the four go down, then across
        flow.renew(grid[0] * grid[1], grid=grid)
        return self.project(self.norm(x.flatten(3).flatten(1, 2), flow), flow)


def _grid_of(x: Tensor, flow: Flow) -> tuple[int, int]:
    """Return height and width of the grid that all of the rows are; raises `SpecError` if they are none."""
    if flow.grid is None or flow.grid[0] * flow.grid[1] != x.shape[1]:
        told = "no grid" if flow.grid is None else f"a grid of {flow.grid[0]} x {flow.grid[1]}"
        raise SpecError(f"windows and merging need rows that are a grid; {x.shape[1]} rows are here, and {told}")
    return flow.grid


def _padded(x: Tensor, side: int) -> Tensor:
    """[B, height, width, D], with zeros to the right and below up to multiples of `side`."""
    bottom, right = -x.shape[1] % side, -x.shape[2] % side
    return F.pad(x, (0, 0, 0, right, 0, bottom)) if bottom or right else x


def _cut(x: Tensor, window: int) -> Tensor:
    """[B, height, width, D] -> [B · W, N, D]."""
    batch, height, width, _ = x.shape
    x = x.reshape(batch, height // window, window, width // window, window, -1).transpose(2, 3)
    return x.reshape(-1, window * window, x.shape[-1])


def flow_within(size: tuple[int, int, int], window: int, shift: int, like: Tensor) -> Flow:
    """Return the flow of the windows' rows; `size` is batch, height, width.

    Rolled rows stand in up to three regions along each side: those that the roll left whole windows of, those of the
    last window that were there before, and those that came round from the other edge.
    """
    batch, height, width = size
    documents = None
    if shift:
        regions = []
        for side in (height, width):
            places = torch.arange(side, device=like.device)
            regions.append((places >= side - window).long() + (places >= side - shift))
        documents = _cut((3 * regions[0][:, None] + regions[1])[None, ..., None], window)[..., 0].repeat(batch, 1)
    rows = window * window
    view = View(rows, rows, None, documents, False, like.device)
    return Flow(view, torch.arange(rows, device=like.device)[None], grid=(window, window))
