"""A model's outline: its spec tree with the parameters of each part, and what repeats said once."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from polyformer.spec import Record, Spec, children, repetitions

if TYPE_CHECKING:
    from rich.table import Table

    from polyformer.parts import Transformer


@dataclass(frozen=True)
class Entry:
    """One part of a model, or several equal ones that stand side by side.

    Attributes:
        name: its place in the part above, as in the names of parameters; `"q, k, v"` or `"blocks.0–5"` for several.
        what: its type and values, as Python would write them; of its parts only those without weights.
        count: how many equal ones there are.
        parameters: those of one; tied ones count where their owner stands.
        tied: what its own tensors are the same as.
        parts: what it is made of.
    """

    name: str
    what: str
    count: int
    parameters: int
    tied: tuple[str, ...] = ()
    parts: tuple[Entry, ...] = field(default=(), repr=False)

    def to_data(self) -> dict[str, Any]:
        """Return what goes into JSON; counts of one and empty lists are left out."""
        data: dict[str, Any] = {"name": self.name, "what": self.what, "parameters": self.parameters}
        if self.count > 1:
            data["count"] = self.count
        if self.tied:
            data["tied"] = list(self.tied)
        if self.parts:
            data["parts"] = [entry.to_data() for entry in self.parts]
        return data


def outline(spec: Transformer) -> Entry:
    """Return the outline of a model, which is built without memory (on the meta device) to count its parameters."""
    built = spec.replace(ties=()).build("meta")
    sizes = {name: weight.numel() for name, weight in built.named_parameters()}
    return _Outline(sizes, {tie.tied: tie.to for tie in spec.ties}).entry("model", "", spec)


class _Outline:
    """Makes entries; knows the size of each parameter and which are tied to which."""

    def __init__(self, sizes: dict[str, int], ties: dict[str, str]) -> None:
        self.sizes, self.ties = sizes, ties

    def entry(self, name: str, path: str, spec: Spec, count: int = 1) -> Entry:
        own = {name for name in self.sizes if name.startswith(path)}
        size = sum(self.sizes[name] for name in own if name not in self.ties)
        tied = tuple(f"{t[len(path) :]} is {to}" for t, to in self.ties.items() if t.rpartition(".")[0] + "." == path)
        return Entry(name, describe(spec), count, size, tied, tuple(self.below(path, spec)))

    def below(self, path: str, spec: Spec) -> Iterator[Entry]:
        """Yield the entries of a spec's parts; equal neighbours, or a pattern of them, become one."""
        parts = [(name, one) for name, one in children(spec) if isinstance(one, Spec) and not _is_detail(one)]
        alike = tuple((one, self.tied_below(f"{path}{name}.")) for name, one in parts)
        for start, period, count in repetitions(alike):
            names = [name for name, _ in parts[start : start + period * count]]
            inner = tuple(
                self.entry(name, f"{path}{name}.", one, 1 if period > 1 else count)
                for name, one in parts[start : start + period]
            )
            if period > 1:
                what = f"{period} in turn"
                yield Entry(_joined(names), what, count, sum(e.parameters for e in inner), (), inner)
            else:
                yield dataclasses.replace(inner[0], name=_joined(names))

    def tied_below(self, path: str) -> frozenset[str]:
        return frozenset(tied[len(path) :] for tied in self.ties if tied.startswith(path))


def _is_detail(spec: Spec) -> bool:
    """Tell whether a part is said in its owner's line: it has no weights, and no parts that could have any."""
    plain = not any(isinstance(inner, Spec) for _, inner in children(spec))
    return plain and not any(True for _ in spec.build("meta").parameters())


def _joined(names: Sequence[str]) -> str:
    """Name several neighbours: `"q, k, v"`, or `"blocks.0–5"` for those of one tuple."""
    if len(names) == 1:
        return names[0]
    stem, _, last = names[-1].rpartition(".")
    return f"{names[0]}–{last}" if stem else ", ".join(names)


def describe(record: Record) -> str:
    """Write a record as Python would, `Attention(heads=Heads(8, 8, 64), see=Causal())`, without its larger parts."""
    told = []
    for one in dataclasses.fields(record):
        value = getattr(record, one.name)
        needed = one.default is dataclasses.MISSING
        if isinstance(value, (tuple, Spec)) and not (isinstance(value, Spec) and _is_detail(value)):
            continue
        if needed or value != one.default:
            text = describe(value) if isinstance(value, Record) else _plain(value)
            told.append(text if needed and not isinstance(value, Record) else f"{one.name}={text}")
    return type(record).__name__ + (f"({', '.join(told)})" if told else "")


def _plain(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else repr(value)


def table(model: Entry) -> Table:
    """Return the outline as a table for a terminal."""
    from rich.table import Table
    from rich.text import Text

    drawn = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    drawn.add_column("part", no_wrap=True)
    drawn.add_column("what", overflow="fold")
    drawn.add_column("parameters", justify="right", no_wrap=True)
    drawn.add_column("share", justify="right", no_wrap=True)
    for guides, entry, total in _lines(model):
        times = f"{entry.count} × " if entry.count > 1 else ""
        share = f"{100 * total / model.parameters:.1f} %" if total else ""
        what = Text(times + entry.what)
        what.highlight_regex(r"\b[A-Z]\w+", "cyan")
        what.append("".join(f"  ({one})" for one in entry.tied), "dim")
        name = Text(guides, "dim").append(entry.name, "bold" if entry.parts else "none")
        drawn.add_row(name, what, f"{times}{entry.parameters:,}" if entry.parameters else "", share)
    return drawn


def _lines(entry: Entry, above: str = "", fork: str = "", times: int = 1) -> Iterator[tuple[str, Entry, int]]:
    """Yield (tree guides, entry, its parameters in the whole model), parents first."""
    times *= entry.count
    yield above + fork, entry, entry.parameters * times
    above += {"": "", "├─ ": "│  ", "└─ ": "   "}[fork]
    for inner in entry.parts:
        yield from _lines(inner, above, "└─ " if inner is entry.parts[-1] else "├─ ", times)
