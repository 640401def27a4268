"""What long work shows on standard error: a bar with rate and time left, or plain lines where no one is watching."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

QUIET_SECONDS = 15.0
"""Between two lines of a log that no terminal shows."""


@contextmanager
def counting(total: int, what: str) -> Iterator[Callable[[int], None]]:
    """Show a bar while `total` things are done; gives the function that is told of each few that were."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=total)
        yield lambda count: bar.advance(task, count)


class TrainingDisplay:
    """Listens to a run's metrics and shows loss, tokens a second, and the time left."""

    def __init__(self) -> None:
        self.validation = ""
        self.spoken = -QUIET_SECONDS
        self.bar: Any = None

    def __enter__(self) -> TrainingDisplay:
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

            columns = (BarColumn(24), TaskProgressColumn(), TextColumn("{task.description}"))
            self.bar = Progress(*columns, console=Console(stderr=True))
            self.bar.add_task("preparing", total=1.0)
            self.bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self.bar is not None:
            self.bar.stop()

    def hear(self, row: dict[str, Any]) -> None:
        """Take one row of `metrics.jsonl`."""
        if "validation_loss" in row:
            self.validation = f"validation {row['validation_loss']:.3f}"
        elif "share" in row:
            self._show(row)

    def _show(self, row: dict[str, Any]) -> None:
        share = min(row["share"], 1.0)
        left = row["seconds"] * (1 - share) / share if share > 0 else 0.0
        told = [f"step {row['step']:,}", f"loss {row['loss']:.3f}", self.validation]
        told += [f"{row['tokens_per_second']:,.0f} tokens/s", f"{duration(left)} left"]
        line = "  ".join(one for one in told if one)
        if self.bar is not None:
            self.bar.update(self.bar.task_ids[0], completed=share, description=line)
        elif time.monotonic() - self.spoken >= QUIET_SECONDS:
            self.spoken = time.monotonic()
            print(f"{100 * share:3.0f} %  {line}", file=sys.stderr, flush=True)


def duration(seconds: float) -> str:
    """Write a time as a person would: `"48 s"`, `"3:07 min"`, `"2:15 h"`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60}:{whole % 60:02} min"
    return f"{whole // 3600}:{whole % 3600 // 60:02} h"
