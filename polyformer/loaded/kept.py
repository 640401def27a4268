"""Plans kept in the user's cache, so that from the second time on a model starts without PyTorch.

A plan follows from what a file says of its model and from our own code, so that it is found by the SHA-256 of both:
one that was made from another file, or by another version, is never found. What is kept is plain data. It is
believed only if it is whole and the user's own, and then no further than its numbers go: which rows of which tensors
are read, and what is done to them, which the native side checks. Whatever is wrong with it, it is made anew.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import secrets
from collections.abc import Iterable, Iterator
from pathlib import Path

from polyformer.data.fetch import cache_folder
from polyformer.errors import SpecError
from polyformer.native.plan import Plan

log = logging.getLogger("polyformer")

MOST = 64
"""Plans that are kept; the oldest give way."""

LARGEST = 2**26
"""Bytes of a plan that are read at most."""

ROOMS = ("spec.py", "families", "native", "parts", "parts/kernels", "weights")
"""The files of ours that a plan follows from."""


def key_of(said: Iterable[bytes | memoryview]) -> str:
    """Return what a plan is found by.

    Args:
        said: all that is said of the model, in pieces.
    """
    found = hashlib.sha256()
    for piece in (*_code(), *said):
        found.update(len(piece).to_bytes(8, "little"))
        found.update(piece)
    return found.hexdigest()


def _code() -> Iterator[bytes]:
    """Yield the name, the size and the time of each file of ours that a plan follows from."""
    base = Path(__file__).parent.parent
    for room in ROOMS:
        place = base / room
        for file in sorted(place.glob("*.py")) if place.is_dir() else [place]:
            state = file.stat()
            yield f"{room}/{file.name} {state.st_size} {state.st_mtime_ns}".encode()


def recall(key: str) -> Plan | None:
    """Return the plan that is kept under a key, None if there is none that is whole."""
    file = folder() / f"{key}.json"
    try:
        state = file.stat()
        if state.st_size > LARGEST or (hasattr(os, "getuid") and state.st_uid != os.getuid()):
            log.info("%s is not taken: it is too large, or another user's", file)
            return None
        first, _, text = file.read_text(encoding="utf-8").partition("\n")
        if first != _sum(key, text):
            log.info("%s is damaged, or another model's; it is made anew", file)
            return None
        return Plan.from_json(text, str(file))
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError, SpecError) as error:
        log.info("%s can't be read, and is made anew: %s", file, error)
        return None


def keep(key: str, plan: Plan) -> None:
    """Keep a plan, if the cache can be written."""
    place = folder()
    text = plan.to_json()
    beside = place / f".{secrets.token_hex(8)}"
    try:
        place.mkdir(parents=True, exist_ok=True)
        beside.write_text(f"{_sum(key, text)}\n{text}", encoding="utf-8")
        beside.replace(place / f"{key}.json")
        kept = sorted(place.glob("*.json"), key=lambda file: file.stat().st_mtime)
        for file in kept[:-MOST]:
            file.unlink(missing_ok=True)
    except OSError as error:
        log.info("the plan of this model can't be kept, so that it starts slowly: %s", error)
        with contextlib.suppress(OSError):
            beside.unlink()


def folder() -> Path:
    """Return where plans are kept."""
    return cache_folder() / "plans"


def _sum(key: str, text: str) -> str:
    return hashlib.sha256(f"{key}\n{text}".encode()).hexdigest()
