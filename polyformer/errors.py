"""Errors that are meant for a person: one sentence that says what was wrong, where, and what to do.

The command line prints the sentence and exits with status 1; a traceback there is a bug of ours.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class PolyformerError(Exception):
    """Base of every error that bad input can cause."""


class SpecError(PolyformerError, ValueError):
    """A spec or recipe that can't be: an unknown key, a value of the wrong kind, sizes that don't fit."""


class DataError(PolyformerError, ValueError):
    """Training or evaluation data that can't be read or used; names the file and the line."""


class WeightsError(PolyformerError, ValueError):
    """A checkpoint that can't be loaded or saved; names the file or the tensor."""


class RunError(PolyformerError, RuntimeError):
    """A run that can't start, go on or be saved."""


def suggest(wrong: str, known: Iterable[str]) -> str:
    """Return `" (did you mean 'x'?)"` for the nearest of `known`, or the list of them when none is near."""
    known = sorted(known)
    near = difflib.get_close_matches(wrong, known, n=1, cutoff=0.6)
    if near:
        return f" (did you mean '{near[0]}'?)"
    return f" (known: {', '.join(known)})" if known else ""
