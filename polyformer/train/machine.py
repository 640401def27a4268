"""What this machine is good at, measured rather than guessed, and what PyTorch should know of it."""

from __future__ import annotations

import contextlib
import ctypes
import time
from typing import Literal

import torch

Precision = Literal["fp32", "bf16"]


def fastest_precision(device: torch.device | str = "cpu") -> Precision:
    """Return "bf16" where a product of a model's size takes at most two thirds of its time in fp32, else "fp32".

    Some processors multiply bfloat16 several times as fast as float32 (AMX), others several times as slow, and
    flags don't tell which; a product does, in some milliseconds.
    """
    if torch.device(device).type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return "bf16" if _seconds(torch.bfloat16) < _seconds(torch.float32) / 1.5 else "fp32"


def _seconds(kind: torch.dtype) -> float:
    a, b = torch.ones(1024, 512, dtype=kind), torch.ones(512, 512, dtype=kind)
    best = float("inf")
    for _ in range(6):
        start = time.perf_counter()
        torch.mm(a, b)
        best = min(best, time.perf_counter() - start)
    return best


def keep_freed_memory() -> None:
    """Tell the C library to keep large freed blocks for reuse.

    By default glibc returns each large block to the system when a tensor dies and has it zeroed page by page when
    the next one is made, every step anew. Elsewhere this does nothing.
    """
    trim_threshold, mmap_threshold = -1, -3
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(mmap_threshold, 2**30)
        libc.mallopt(trim_threshold, 2**31 - 1)
