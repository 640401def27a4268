"""Attention drawn: one picture of all layers and heads."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from polyformer.errors import DataError, RunError, SpecError
from polyformer.explain.attention import Explained, Kind, explain_attention
from polyformer.explain.labels import FIRST_CHOICE, Lettering, breadth, find_lettering
from polyformer.generate import Search, Translation, translate
from polyformer.parts.model import TransformerPart
from polyformer.spec import Record

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.transforms import Transform

    from polyformer.data.tokenizer import TextPairTokenizer

TITLES: dict[Kind, str] = {
    "encoder": "Encoder self-attention: each source token (row) looks at the source (columns)",
    "cross": "Cross-attention: while a token is written (row), the decoder looks at the source (columns)",
    "decoder": "Decoder self-attention: while a token is written (row), the decoder looks back (columns)",
}
CELL = 0.125  # inches; a token's row or column
PANEL_HEAD = 0.75  # inches above a panel's token labels, for its title
FOOT = 0.75  # inches for the colour bar
NARROWEST = 8.0  # inches
GAP = 1  # cells between two maps
TOKEN_POINTS = 6.5
DPI, MOST_PIXELS = 150, 10_000


class Picture(Record):
    """What of the attention is drawn.

    Attributes:
        kinds: which attentions.
        layers: which layers, counted from 1; none means all.
    """

    kinds: tuple[Kind, ...] = ("cross", "encoder", "decoder")
    layers: tuple[int, ...] = ()

    def check(self) -> None:
        self.require(len(self.kinds) > 0, "kinds should name at least one of encoder, cross and decoder")


def attention_picture(
    model: TransformerPart,
    tokenizer: TextPairTokenizer,
    text: str,
    file: str | Path,
    options: Picture | None = None,
    settings: Search | None = None,
    target_language: str | None = None,
) -> Translation:
    """Translate a text and draw the attention of its best translation as PNG.

    Args:
        file: where the picture goes; what stands there is replaced.
        options: what is drawn; everything if None.
        settings: how to search; `Search()` if None.
    Returns:
        the translation that the picture is of.
    Raises:
        DataError: a text of white space only, or one that the model or the tokenizer can't take.
        SpecError: layers that the model doesn't have.
        RunError: the file can't be written, or matplotlib isn't installed.
    """
    if not text.strip():
        raise DataError("there is no attention to draw: the text is empty")
    best = translate(model, tokenizer, [text], settings, target_language)[0][0]
    source = tokenizer.encode_source(text, target_language)
    drawn = draw_attention(explain_attention(model, tokenizer, source, best.ids), options or Picture())
    try:
        Path(file).write_bytes(drawn)
    except OSError as error:
        raise RunError(f"the picture {file} can't be written: {error.strerror}") from None
    return best


@dataclass(frozen=True)
class Panel:
    """The maps of one kind, as a grid: layers downwards, heads to the right.

    Attributes:
        layers: their numbers.
        weights: for each layer [H, S, K].
        rows, columns: labels of S and K.
    """

    kind: Kind
    layers: list[int]
    weights: list[Tensor]
    rows: list[str]
    columns: list[str]

    @property
    def heads(self) -> int:
        """The number of heads of the layer that has most."""
        return max(len(weights) for weights in self.weights)

    @property
    def size(self) -> tuple[int, int]:
        """Cells, (high, wide)."""
        return (
            len(self.layers) * (len(self.rows) + GAP) - GAP,
            self.heads * (len(self.columns) + GAP) - GAP,
        )

    def grid(self) -> Tensor:
        """Return all maps in one array of `size`; NaN where there is none."""
        grid = torch.full(self.size, float("nan"))
        for i, weights in enumerate(self.weights):
            for head, map_SK in enumerate(weights):
                top, left = i * (len(self.rows) + GAP), head * (len(self.columns) + GAP)
                grid[top : top + len(self.rows), left : left + len(self.columns)] = map_SK
        return grid


def draw_attention(explained: Explained, options: Picture) -> bytes:
    """Draw maps as PNG: a panel for each kind, with a row for each layer and a column for each head.

    Raises:
        SpecError: layers that the model doesn't have.
        RunError: matplotlib isn't installed.
    """
    try:
        from matplotlib import rc_context
    except ImportError:
        raise RunError("drawing needs matplotlib; install it with: pip install 'polyformer[plot]'") from None
    panels = [_panel(explained, kind, options.layers) for kind in options.kinds]
    lettering = find_lettering([*explained.source, *explained.read, *explained.written])
    with rc_context({"font.family": lettering.families, "text.parse_math": False}):
        figure = _layout(panels, lettering)
        written = io.BytesIO()
        figure.savefig(written, format="png")
    return written.getvalue()


def _layout(panels: list[Panel], lettering: Lettering) -> Figure:
    """Place the panels below each other, in inches, and a colour bar below them."""
    from matplotlib.colors import PowerNorm
    from matplotlib.figure import Figure

    labels = [lettering.label(token) for panel in panels for token in panel.rows + panel.columns]
    room = max(map(breadth, labels)) * TOKEN_POINTS / 72 + 0.05
    heights = [panel.size[0] * CELL + room + PANEL_HEAD for panel in panels]
    left, height = room + 0.45, sum(heights) + FOOT
    width = max(left + max(panel.size[1] for panel in panels) * CELL + 0.2, NARROWEST)
    figure = Figure(figsize=(width, height), dpi=min(DPI, MOST_PIXELS / max(width, height)))
    bottom = height
    for panel, own in zip(panels, heights, strict=True):
        bottom -= own
        high, wide = (cells * CELL for cells in panel.size)
        axes = figure.add_axes((left / width, bottom / height, wide / width, high / height))
        image = axes.imshow(panel.grid().numpy(), cmap="YlGnBu", norm=PowerNorm(0.5, 0, 1), aspect="auto")
        _label(axes, panel, lettering, room)
    bar = figure.add_axes((left / width, 0.3 / height, 2.5 / width, 0.09 / height))
    figure.colorbar(image, cax=bar, orientation="horizontal", ticks=[0, 0.05, 0.2, 0.5, 1])
    bar.tick_params(labelsize=TOKEN_POINTS, length=2)
    bar.set_title(f"attention weight      {lettering.caption()}", fontsize=TOKEN_POINTS, pad=3, loc="left")
    return figure


def _panel(explained: Explained, kind: Kind, wanted: Sequence[int]) -> Panel:
    maps = [one for one in explained.maps if one.kind == kind]
    known = sorted({one.layer for one in maps})
    for layer in wanted:
        if layer not in known:
            raise SpecError(f"there is no layer {layer} of {kind} attention; there are {known[0]} to {known[-1]}")
    chosen = [one for one in maps if not wanted or one.layer in wanted]
    rows = explained.source if kind == "encoder" else explained.written
    columns = explained.read if kind == "decoder" else explained.source
    return Panel(kind, [one.layer for one in chosen], [one.weights for one in chosen], rows, columns)


def _label(axes: Axes, panel: Panel, lettering: Lettering, room: float) -> None:
    """Name rows, columns, layers, heads and the panel; `room` is what tokens take, in inches."""
    rows, columns = len(panel.rows), len(panel.columns)
    starts = [i * (rows + GAP) for i in range(len(panel.layers))], [i * (columns + GAP) for i in range(panel.heads)]
    named = [lettering.label(token) for token in panel.rows], [lettering.label(token) for token in panel.columns]
    axes.set_yticks([start + row for start in starts[0] for row in range(rows)], named[0] * len(panel.layers))
    axes.set_xticks([start + column for start in starts[1] for column in range(columns)], named[1] * panel.heads)
    axes.tick_params(length=0, pad=2, labelsize=TOKEN_POINTS, top=True, bottom=False, labeltop=True, labelbottom=False)
    axes.tick_params(axis="x", rotation=90)
    axes.spines[:].set_visible(False)

    def write(text: str, at: tuple[float, float], offset: tuple[float, float], by: Transform, **style: Any) -> None:
        points = offset[0] * 72, offset[1] * 72
        axes.annotate(text, at, points, xycoords=by, textcoords="offset points", **style)

    for layer, start in zip(panel.layers, starts[0], strict=True):
        style = {"rotation": 90, "ha": "center", "va": "center", "fontsize": 8}
        write(f"layer {layer}", (0, start + (rows - 1) / 2), (-room - 0.15, 0), axes.get_yaxis_transform(), **style)
    for head, start in enumerate(starts[1], 1):
        style = {"ha": "center", "fontsize": 8}
        write(f"head {head}", (start + (columns - 1) / 2, 1), (0, room + 0.07), axes.get_xaxis_transform(), **style)
    write(
        TITLES[panel.kind],
        (0, 1),
        (0, room + 0.28),
        axes.transAxes,
        fontsize=9.5,
        fontweight="bold",
        family=FIRST_CHOICE,
    )
