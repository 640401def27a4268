"""What this machine is good at, measured rather than guessed."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Literal

import torch

Precision = Literal["fp32", "bf16"]
Device = Literal["cpu", "cuda"]


def best_device() -> Device:
    """Return "cuda" where PyTorch finds a GPU, else "cpu"."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def fastest_precision(device: Device) -> Precision:
    """Return "bf16" where a product of a model's size takes at most two thirds of its time in fp32, else "fp32".

    Some processors multiply bfloat16 several times as fast as float32 (AMX), others several times as slow, and
    flags don't tell which; a product does, in some milliseconds.
    """
    if device == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    kinds = (torch.bfloat16, torch.float32)
    best = dict.fromkeys(kinds, float("inf"))
    for _ in range(20):  # in turn, and the best of each: the machine may be busy
        for kind in kinds:
            a, b = torch.ones(1024, 512, dtype=kind), torch.ones(512, 512, dtype=kind)
            start = time.perf_counter()
            torch.mm(a, b)
            best[kind] = min(best[kind], time.perf_counter() - start)
    return "bf16" if best[torch.bfloat16] < best[torch.float32] / 1.5 else "fp32"


def reset_peak_memory() -> None:
    """Let `peak_memory` count from now on, where the system can."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return


def peak_memory() -> int | None:
    """Return the most bytes of memory that this process had since `reset_peak_memory`; None where no one tells."""
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    except OSError:
        return None
    found = re.search(r"VmHWM:\s+(\d+) kB", status)
    return None if found is None else 1024 * int(found[1])
