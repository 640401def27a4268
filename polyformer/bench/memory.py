"""How much memory a computation's tensors take at most, counted by the allocator itself."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Memory:
    """What one computation took, in bytes.

    Attributes:
        peak: the most that was held at once, of all that the computation made.
        extra: the same without its answers (and without the inputs, which were there before).
        seconds: how long it took while it was watched.
    """

    peak: int
    extra: int
    seconds: float


def memory_of(work: Callable[[], Sequence[Tensor]]) -> Memory:
    """Run a computation once and count what it allocates on the CPU.

    PyTorch's profiler reports each block that its allocator hands out or takes back, whoever asked: tensors made in
    Python, in C++ inside of an operator (the buffers of `scaled_dot_product_attention`, the float mask that it makes of
    a boolean one), in a backward pass, or in an autograd function of one's own. Not seen is what libraries take from
    the system themselves (buffers in which MKL and oneDNN lay out matrices for a product, stacks of threads: some
    megabytes), and what the system's `malloc` keeps of freed blocks, which made a process a third larger where they
    were many; told to keep none, it grew by what is counted here, to 1 %.

    Args:
        work: returns its answers; a tensor that it made and returns is no extra memory.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or the profiler's library tells of its start and end each time
    profiler: Any = torch.autograd.profiler.profile(use_kineto=True, profile_memory=True)
    started = time.perf_counter()
    with profiler as watched:
        answers = work()
    seconds = time.perf_counter() - started
    blocks = sorted(_blocks(watched.kineto_results.experimental_event_tree()), key=lambda block: block[0])
    last = {address: i for i, (_, address, _) in enumerate(blocks)}
    kept = {last.get(answer.untyped_storage().data_ptr()) for answer in answers}
    peak = _highest((address, size) for _, address, size in blocks)
    extra = _highest((address, size) for i, (_, address, size) in enumerate(blocks) if i not in kept)
    return Memory(peak, extra, seconds)


def _blocks(events: Sequence[Any]) -> Iterator[tuple[int, int, int]]:
    """Yield time, address and size of each block below some events; the size is negative where it is taken back."""
    for event in events:
        if event.tag == torch._C._profiler._EventType.Allocation and event.extra_fields.device.type == "cpu":
            yield event.start_time_ns, event.extra_fields.ptr, event.extra_fields.alloc_size
        yield from _blocks(event.children)


def _highest(blocks: Iterable[tuple[int, int]]) -> int:
    """Return the most that is held at once; what is taken back but was handed out before doesn't count."""
    held, highest = dict[int, int](), 0
    total = 0
    for address, size in blocks:
        total -= held.pop(address, 0)
        if size > 0:
            held[address] = size
            total += size
            highest = max(highest, total)
    return highest


def available_memory() -> int:
    """Return the bytes that the system could still give, or all that the machine has where it doesn't say."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
