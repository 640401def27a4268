"""BigBird's and Longformer's attention in blocks against PyTorch's attention with the dense mask of the same rule.

    OMP_NUM_THREADS=2 python benchmarks/sparse.py --length 8192 --repeats 3

prints, for each pattern, the medians of alternating runs, forward and training step, in milliseconds, and their ratio.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from polyformer.parts import BlockSparse, BlockWindow, Context, Edges, Marked, RandomBlocks, Rule, Softmax, Window
from polyformer.parts.flow import start_flow

PATTERNS: dict[str, Rule] = {
    "BigBird": BlockWindow(64) | Edges(64) | RandomBlocks(64, 3, 1),
    "BigBird, heads drawing for themselves": BlockWindow(64) | Edges(64) | RandomBlocks(64, 3, 8),
    "BigBird, nothing drawn": BlockWindow(64) | Edges(64),
    "Longformer": Window(129) | Marked(),
    "Longformer, wide": Window(257) | Marked(),
}


def measure(length: int, rule: Rule, repeats: int) -> dict[str, float]:
    """Return medians in milliseconds, and how much faster blocks are."""
    chance = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, length, 8, 64, generator=chance).transpose(1, 2).requires_grad_() for _ in range(3))
    view = start_flow(torch.zeros(1, length)).view.marking(torch.arange(length)[None] < 16)
    kernels = {"blocks": cast(Any, BlockSparse(64).build()), "dense": cast(Any, Softmax().build())}
    times: dict[str, list[float]] = {}
    for _ in range(repeats):
        for name, kernel in kernels.items():
            with torch.no_grad():
                times.setdefault(f"{name}, forward", []).append(
                    timed(lambda kernel=kernel: kernel.attend((q, k, v), Context(rule, view)))
                )
            times.setdefault(f"{name}, training", []).append(
                timed(lambda kernel=kernel: step(kernel.attend((q, k, v), Context(rule, view))))
            )
    found = {name: statistics.median(one[1:] or one) for name, one in times.items()}
    for kind in ("forward", "training"):
        found[f"ratio, {kind}"] = found[f"dense, {kind}"] / found[f"blocks, {kind}"]
    return found


def step(out: Tensor) -> None:
    """Work out gradients."""
    out.sum().backward()  # type: ignore[no-untyped-call]


def timed(work: Callable[[], object]) -> float:
    """Return milliseconds."""
    start = time.perf_counter()
    work()
    return 1e3 * (time.perf_counter() - start)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--repeats", type=int, default=4, help="the first of them is not counted")
    parser.add_argument("--only", default="", help="patterns whose names begin so")
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    found = {
        name: measure(asked.length, rule, asked.repeats)
        for name, rule in PATTERNS.items()
        if name.startswith(asked.only)
    }
    if asked.json:
        print(json.dumps(found, indent=1))
        return
    for name, times in found.items():
        print(name)
        for what, value in times.items():
            print(f"  {what}: {value:.1f}")


if __name__ == "__main__":
    main()
