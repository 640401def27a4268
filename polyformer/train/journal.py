"""The record of a run: `metrics.jsonl`, one JSON object a line; everything else is drawn from it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Protocol

from polyformer.errors import RunError

Row = dict[str, Any]


class Listener(Protocol):
    """Something that wants to hear of each row: a progress display, TensorBoard."""

    def hear(self, row: Row) -> None:
        """Take one row."""


class Journal:
    """Appends rows to a file and tells listeners. Its length in bytes is part of a checkpoint.

    A run that is resumed drops the rows written after its checkpoint, so that each step stands once.
    """

    def __init__(self, path: Path, length: int = 0, listeners: tuple[Listener, ...] = ()) -> None:
        self.path, self.listeners = path, listeners
        try:
            self.file = path.open("ab")
            self.file.truncate(length)
        except OSError as error:
            raise RunError(f"{path} can't be written: {error.strerror}") from None

    def write(self, row: Row) -> None:
        """Append one row and tell the listeners; raises `RunError` on a full disk."""
        try:
            self.file.write(json.dumps(row).encode() + b"\n")
            self.file.flush()
        except OSError as error:
            raise RunError(f"{self.path} can't be written: {error.strerror}") from None
        for listener in self.listeners:
            listener.hear(row)

    def sync(self) -> int:
        """Make sure that all rows are on disk; return the length in bytes."""
        os.fsync(self.file.fileno())
        return self.path.stat().st_size

    def close(self) -> None:
        """Close the file."""
        self.file.close()


def read_metrics(path: Path) -> list[Row]:
    """Return the rows of a `metrics.jsonl`; a last line cut short by a kill is left out."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        if line.endswith("\n"):
            rows.append(json.loads(line))
    return rows


class TensorBoard:
    """Sends the rows to TensorBoard (an extra)."""

    def __init__(self, folder: Path) -> None:
        try:
            from torch.utils.tensorboard.writer import SummaryWriter
        except ImportError:
            raise RunError("TensorBoard is not installed; pip install 'polyformer[tensorboard]'") from None
        self.writer = SummaryWriter(str(folder))

    def hear(self, row: Row) -> None:
        for name, value in row.items():
            if name != "step" and isinstance(value, (int, float)):
                self.writer.add_scalar(name, value, row["step"])
        self.writer.flush()
