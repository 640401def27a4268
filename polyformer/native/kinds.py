"""How a program's matrices are held."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from polyformer.native.machine import OWN_KINDS, Given, Kind
from polyformer.native.program import ChooseExperts, Multiply, MultiplyChosen, Program, TakeTokens, written_by

Precision = Literal["as stored", "fp32", "q8", "q4"]
"""How matrices are held. "q4" keeps the table of tokens, and a head tied to it, in 8 bits, as most such files do."""


def kinds_for(program: Program, precision: Precision) -> Callable[[str, Given], Kind]:
    """Return what says how each matrix is held."""
    tokens = {one.table for one in (*program.read, *program.write) if isinstance(one, TakeTokens)}
    places = {one.path for one in program.weights} - _multiplied(program) - tokens
    routers = _routers(program)

    def kind(path: str, given: Given) -> Kind:
        if path in places or precision == "fp32" or (path in routers and precision != "as stored"):
            return "f32"
        if ".adapters." in path:  # which are small, and whose rows are too short for a code's groups
            return "f32"
        if precision == "as stored":
            return OWN_KINDS.get(given.source, "f32")
        return "q4m" if precision == "q4" and path not in tokens else "q8"

    return kind


def _multiplied(program: Program) -> set[str]:
    steps = (*program.read, *program.write)
    return {matrix for one in steps if isinstance(one, Multiply | MultiplyChosen) for matrix in one.matrices}


def _routers(program: Program) -> set[str]:
    """Return the matrices that experts are chosen by: small, and with all to lose, so that they stay floats."""
    found: set[str] = set()
    for part in (program.read, program.write):
        wrote: dict[int, str] = {}
        for one in part:
            wrote |= dict.fromkeys(written_by(one), "")
            if isinstance(one, Multiply):
                wrote |= dict(zip(one.outs, one.matrices, strict=True))
            if isinstance(one, ChooseExperts):
                found.add(wrote.get(one.x, ""))
    return found
