"""What became of each tensor when a model was changed."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Fate = Literal["kept", "mapped", "joined", "averaged", "cut", "padded", "new", "left out"]
FATES: tuple[Fate, ...] = ("kept", "mapped", "joined", "averaged", "cut", "padded", "new", "left out")


@dataclass(frozen=True)
class Entry:
    """One tensor's fate.

    Attributes:
        names: where it stands; a tied tensor has several names, and is one tensor.
        fate: kept: the same numbers under the same name; mapped: under another name, or the same function of the
            model written otherwise; joined: several, one behind the other; averaged: heads made one by their mean;
            cut or padded: another size, whose additional values are initialised; new: initialised; left out: of the
            old model, and not in the new.
        shape: in the new model; of what was left out, in the old.
        source: the name in the old model of what it was made of; None for a new one.
        note: what was done, in words; empty where the fate says it all.
    """

    names: tuple[str, ...]
    fate: Fate
    shape: tuple[int, ...]
    source: str | None = None
    note: str = ""

    @property
    def values(self) -> int:
        """How many numbers it holds."""
        return math.prod(self.shape)

    def to_data(self) -> dict[str, Any]:
        """Return what goes into JSON; the source is left out where it is the name itself."""
        data: dict[str, Any] = {"name": self.names[0], "fate": self.fate, "shape": list(self.shape)}
        if len(self.names) > 1:
            data["tied"] = list(self.names[1:])
        if self.source not in (None, self.names[0]):
            data["source"] = self.source
        if self.note:
            data["note"] = self.note
        return data


@dataclass(frozen=True)
class Report:
    """What became of each tensor: `tensors` are all of the new model, `left_out` those of the old that have no use.

    As text, a table in which equal fates of neighbouring blocks are one line.
    """

    tensors: tuple[Entry, ...]
    left_out: tuple[Entry, ...]

    @property
    def summary(self) -> dict[Fate, tuple[int, int]]:
        """How many tensors, and how many values in them, have each fate."""
        every = (*self.tensors, *self.left_out)
        own = {fate: [entry.values for entry in every if entry.fate == fate] for fate in FATES}
        return {fate: (len(values), sum(values)) for fate, values in own.items() if values}

    def to_data(self) -> dict[str, Any]:
        """Return what goes into JSON."""
        return {
            "summary": {fate: {"tensors": n, "values": values} for fate, (n, values) in self.summary.items()},
            "tensors": [entry.to_data() for entry in self.tensors],
            "left_out": [entry.to_data() for entry in self.left_out],
        }

    def __str__(self) -> str:
        summary = [(fate, f"{n:,} tensors", f"{values:,} values") for fate, (n, values) in self.summary.items()]
        lines = [_line(group) for group in _alike((*self.tensors, *self.left_out))]
        heading = ("fate", "tensor", "shape", "how")
        return "\n".join((*_columns(summary, right=(1, 2)), "", *_columns([heading, *lines])))


_BLOCK = re.compile(r"(?<=\bblocks\.)\d+")


def _alike(entries: Iterable[Entry]) -> list[list[Entry]]:
    """Put together what differs in the number of its block only."""
    groups: dict[tuple[Any, ...], list[Entry]] = {}
    for entry in entries:
        patterns = _pattern(entry.names[0]), _pattern(entry.source or "")
        groups.setdefault((entry.fate, entry.shape, entry.note, len(entry.names), *patterns), []).append(entry)
    return list(groups.values())


def _line(group: Sequence[Entry]) -> tuple[str, str, str, str]:
    """Return fate, name, shape and how, of tensors that are alike."""
    first = group[0]
    sources = [entry.source for entry in group if entry.source is not None]
    moved = any(entry.source not in (None, *entry.names) for entry in group)
    said = (
        f"from {_folded(sources)}" if moved else "",
        first.note,
        f"tied: {_folded([name for entry in group for name in entry.names[1:]])}" if len(first.names) > 1 else "",
    )
    name = _folded([entry.names[0] for entry in group])
    return first.fate, name, str(list(first.shape)), "; ".join(one for one in said if one)


def _folded(names: Iterable[str]) -> str:
    """List names; those that differ in the number of their block only are written once: `"blocks.0–5.norm.weight"`."""
    blocks: dict[str, list[int]] = {}
    for name in names:
        found = _BLOCK.search(name)
        blocks.setdefault(_pattern(name), []).extend([] if found is None else [int(found[0])])
    return ", ".join(pattern.replace("*", _numbers(own)) for pattern, own in blocks.items())


def _pattern(name: str) -> str:
    return _BLOCK.sub("*", name, count=1)


def _numbers(numbers: Sequence[int]) -> str:
    if len(numbers) > 2 and list(numbers) == list(range(numbers[0], numbers[-1] + 1)):
        return f"{numbers[0]}–{numbers[-1]}"
    return ",".join(map(str, numbers))


def _columns(rows: Sequence[Sequence[str]], right: tuple[int, ...] = ()) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if i in right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
