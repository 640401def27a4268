"""Cost curves drawn: time and memory over the length, forward and in training, on logarithmic axes."""

from __future__ import annotations

import io
import math
import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from polyformer.bench.attention import MODES, Curves, Quantity
from polyformer.bench.contestants import KINDS, Contestant, Kind
from polyformer.bench.work import Mode
from polyformer.errors import RunError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SHADES: dict[Kind, tuple[str, ...]] = {
    "dense": ("#111827", "#6b7280", "#9ca3af", "#4b5563", "#b6bcc6", "#7c8594", "#a8a29e", "#57534e", "#334155"),
    "exact": ("#1d4ed8", "#60a5fa", "#1e3a8a"),
    "sparse": ("#047857", "#34d399", "#65a30d", "#0d9488", "#14532d", "#84cc16"),
    "linear": ("#c2410c", "#f59e0b", "#dc2626", "#a16207", "#f472b6", "#7f1d1d"),
    "hashing": ("#7c3aed", "#c026d3", "#a78bfa"),
}
"""Colours of each kind, in the order of its contestants."""
MARKERS = "osD^vP"
TITLES: dict[Quantity, str] = {"seconds": "Time", "bytes": "Peak memory beside inputs and answers"}
NAMES: dict[Mode, str] = {"forward": "forward", "training": "training step"}
LABEL_POINTS = 7.5
GAP = 0.036
"""Between two labels, as a share of a panel's height."""


@contextmanager
def picture_file(file: Path, replace: bool = False) -> Iterator[BinaryIO]:
    """Give a file to write a picture to, which takes its place when all is written.

    Whether it can be written, and drawn at all, is found out at once, before anything is measured.

    Raises:
        RunError: the name is not one of a PNG file, something stands there and is not to be replaced, the folder can't
            be written to, or matplotlib isn't installed.
    """
    if file.suffix.lower() != ".png":
        raise RunError(f"the picture is a PNG file, so its name should end in .png, not '{file.name}'")
    if file.is_dir():
        raise RunError(f"{file} is a folder; name a file for the picture")
    if file.exists() and not replace:
        raise RunError(f"{file} exists; replace it with --force, or choose another file")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise RunError("drawing needs matplotlib; install it with: pip install 'polyformer[plot]'") from None
    try:
        aside = tempfile.NamedTemporaryFile(dir=file.parent, prefix=f".{file.name}.", delete=False)  # noqa: SIM115
    except OSError as error:
        raise _unwritten(file, error) from None
    try:
        with aside:
            yield aside  # type: ignore[misc]
        _take_place(Path(aside.name), file)
    finally:
        Path(aside.name).unlink(missing_ok=True)


def _take_place(aside: Path, file: Path) -> None:
    """Put a file that is written where it belongs."""
    try:
        with aside.open("rb+") as whole:
            os.fsync(whole.fileno())
        aside.chmod(0o644)
        aside.replace(file)
    except OSError as error:
        raise _unwritten(file, error) from None


def _unwritten(file: Path, error: OSError) -> RunError:
    return RunError(f"the picture {file} can't be written: {error.strerror}")


@dataclass(frozen=True)
class Line:
    """One contestant's curve in a panel."""

    contestant: Contestant
    points: dict[int, float]
    colour: str
    marker: str
    exponent: float | None

    @property
    def label(self) -> str:
        grows = "" if self.exponent is None else f"  $n^{{\\,{self.exponent:.2f}}}$"
        return self.contestant.name + grows


def draw_curves(curves: Curves) -> bytes:
    """Draw curves as PNG: time on the left and memory on the right, forward above and training below.

    Raises:
        RunError: matplotlib isn't installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise RunError("drawing needs matplotlib; install it with: pip install 'polyformer[plot]'") from None
    figure = Figure(figsize=(15, 12), dpi=130)
    panels = figure.subplots(2, 2, sharex=True)
    figure.subplots_adjust(left=0.055, right=0.875, top=0.905, bottom=0.085, wspace=0.42, hspace=0.13)
    for mode, row in zip(MODES, panels, strict=True):
        for quantity, axes in zip(TITLES, row, strict=True):
            lines = _lines(curves, mode, quantity)
            _draw(axes, lines, quantity)
            axes.set_title(f"{TITLES[quantity]}, {NAMES[mode]}", fontsize=10.5, loc="left", fontweight="bold", pad=6)
            _label(axes, lines)
    for axes in panels[1]:
        axes.set_xlabel("length n", fontsize=9)
    _tell(figure, curves)
    written = io.BytesIO()
    figure.savefig(written, format="png")
    return written.getvalue()


def _lines(curves: Curves, mode: Mode, quantity: Quantity) -> list[Line]:
    found, counts = [], dict.fromkeys(KINDS, 0)
    for one in curves.contestants:
        place, counts[one.kind] = counts[one.kind], counts[one.kind] + 1
        points = {n: cost for n, cost in curves.points(one.name, mode, quantity).items() if cost > 0}
        fit = curves.fit(one.name, mode, quantity)
        shades = SHADES[one.kind]
        colour, marker = shades[place % len(shades)], MARKERS[place % len(MARKERS)]
        if points:
            found.append(Line(one, points, colour, marker, None if fit is None else fit.exponent))
    return found


def _draw(axes: Axes, lines: Sequence[Line], quantity: Quantity) -> None:
    """Draw the curves of a panel, with its scales."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

    axes.set_xscale("log")
    axes.set_yscale("log")
    for line in lines:
        dashed = "--" if line.contestant.kind == "dense" else "-"
        style: dict[str, Any] = {"lw": 1.7, "ls": dashed, "ms": 4.2, "marker": line.marker, "color": line.colour}
        axes.plot(list(line.points), list(line.points.values()), **style)
    lengths = sorted({n for line in lines for n in line.points})
    if not lengths:
        axes.text(0.5, 0.5, "nothing was measured", transform=axes.transAxes, ha="center", color="#6b7280")
        return
    axes.xaxis.set_major_locator(FixedLocator(lengths))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda n, _: f"{n:,.0f}"))
    costs = [cost for line in lines for cost in line.points.values()]
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if max(costs) < 300 * min(costs) else (1,)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _tick(value, quantity)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.margins(x=0.03, y=0.06)
    axes.grid(color="#e5e7eb", lw=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=8, length=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#9ca3af")
    _guides(axes)


def _guides(axes: Axes) -> None:
    """Show the slopes of n and n², from a corner that curves leave free."""
    (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
    for power, name in ((1, "∝ n"), (2, "∝ n²")):
        reach = min(0.16 * math.log(right / left), 0.2 * math.log(high / low) / power)
        x, y = left * (right / left) ** 0.035, low * (high / low) ** 0.74
        end = (x * math.exp(reach), y * math.exp(power * reach))
        axes.plot((x, end[0]), (y, end[1]), color="#9ca3af", lw=1, ls=":", scalex=False, scaley=False)
        axes.annotate(name, end, (3, -2), textcoords="offset points", fontsize=LABEL_POINTS, color="#6b7280")


def _label(axes: Axes, lines: Sequence[Line]) -> None:
    """Name each curve at the panel's right edge, with a thin line to its last point."""
    if not lines:
        return
    down = axes.transData + axes.transAxes.inverted()
    ends = [down.transform(max(line.points.items())) for line in lines]
    places = spread([float(y) for _, y in ends], GAP, 0.0, 1.0)
    for line, (x, y), place in zip(lines, ends, places, strict=True):
        thin: dict[str, Any] = {"lw": 0.6, "color": line.colour, "alpha": 0.55, "clip_on": False}
        axes.plot((x + 0.006, 1.0, 1.025), (y, place, place), transform=axes.transAxes, **thin)
        weight = "bold" if line.contestant.name == "sdpa" else "normal"
        style: dict[str, Any] = {"fontsize": LABEL_POINTS, "va": "center", "color": line.colour, "fontweight": weight}
        axes.text(1.032, place, line.label, transform=axes.transAxes, **style)


def spread(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Return places near the wanted ones, in the same order, of which no two are nearer than `gap`.

    They stay between `low` and `high` where there is room.
    """
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    groups: list[tuple[float, list[int]]] = []  # the middle of some labels that touch
    for i in order:
        middle, members = wanted[i], [i]
        while groups and middle - gap * (len(members) - 1) / 2 < groups[-1][0] + gap * (len(groups[-1][1]) + 1) / 2:
            members = groups.pop()[1] + members
            middle = sum(wanted[j] for j in members) / len(members)
            half = gap * (len(members) - 1) / 2
            middle = max(min(middle, high - half), low + half)
        groups.append((middle, members))
    found = [0.0] * len(wanted)
    for middle, members in groups:
        for place, i in enumerate(members):
            found[i] = middle + gap * (place - (len(members) - 1) / 2)
    return found


def _tell(figure: Figure, curves: Curves) -> None:
    """Say above the panels what was measured, and below them what the colours and labels mean."""
    from matplotlib.lines import Line2D

    sizes, machine = curves.settings.sizes, curves.machine
    what = "q, k and v given" if sizes.level == "kernel" else "with its matrices"
    told = f"{sizes.heads} heads × {sizes.head}, batch {sizes.batch}, {sizes.dtype}, {what}"
    where = f"{machine['processor']}, {machine['threads']} thread{'s' * (machine['threads'] != 1)}"
    figure.text(0.055, 0.965, "What attention costs", fontsize=16, fontweight="bold")
    figure.text(0.055, 0.943, f"{told}  ·  {where}, PyTorch {machine['torch']}", fontsize=9, color="#4b5563")
    kinds = [kind for kind in KINDS if any(one.kind == kind for one in curves.contestants)]
    handles = [Line2D([], [], color=SHADES[kind][0], lw=2.5, ls="--" if kind == "dense" else "-") for kind in kinds]
    names = [f"{kind}: {KINDS[kind]}" for kind in kinds]
    placed: dict[str, Any] = {"loc": "lower left", "bbox_to_anchor": (0.05, 0.022), "ncols": len(kinds)}
    figure.legend(handles, names, frameon=False, fontsize=8, handlelength=2, columnspacing=1.8, **placed)
    start = curves.settings.fit_from
    foot = f"Behind each name: its growth, fitted from n = {start:,} on. A training step is forward and backward."
    clock = "Processor times" if curves.settings.conditions.clock == "processor" else "Times"
    figure.text(0.055, 0.014, f"{foot} {clock} are medians of alternating runs.", fontsize=8, color="#6b7280")


def _tick(cost: float, quantity: Quantity) -> str:
    """Write a round number without decimals: `"10 ms"`."""
    return re.sub(r"\.0+(?= )", "", shown(cost, quantity))


def shown(cost: float, quantity: Quantity) -> str:
    """Write seconds or bytes as a person would: `"3.25 ms"`, `"68 MB"`."""
    units = (
        ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs")) if quantity == "seconds" else ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"))
    )
    for unit, name in units:
        if cost >= 0.9995 * unit:
            return f"{cost / unit:.{2 if cost < 9.995 * unit else 1 if cost < 99.95 * unit else 0}f} {name}"
    return f"{cost:.3g} {'s' if quantity == 'seconds' else 'B'}"
