"""What tensors take is counted where it is allocated: held against known sizes, and against the process itself."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from polyformer.bench.memory import available_memory, memory_of

MANY = 250_000  # a million bytes in float32


def test_what_is_made_and_freed_is_counted() -> None:
    def work() -> tuple[Tensor, ...]:
        first, second = torch.empty(4 * MANY), torch.empty(2 * MANY)
        del first
        return (second[:MANY] + 1,)

    found = memory_of(work)
    assert (found.peak, found.extra) == (6_000_000, 6_000_000)


def test_an_answer_is_not_extra() -> None:
    found = memory_of(lambda: (torch.empty(MANY),))
    assert (found.peak, found.extra) == (1_000_000, 0)
    found = memory_of(lambda: (torch.empty(2 * MANY)[:10],))
    assert (found.peak, found.extra) == (2_000_000, 0), "a view holds all of it"


def test_an_answer_is_no_discount_while_it_is_not_there() -> None:
    def work() -> tuple[Tensor, ...]:
        torch.empty(3 * MANY)
        return (torch.empty(2 * MANY),)

    found = memory_of(work)
    assert (found.peak, found.extra) == (3_000_000, 3_000_000)


def test_what_was_there_before_does_not_count() -> None:
    held = [torch.empty(8 * MANY)]

    def work() -> tuple[Tensor, ...]:
        held.clear()
        torch.empty(MANY)
        return ()

    assert memory_of(work).peak == 1_000_000
    assert memory_of(lambda: ()).peak == 0


def test_views_and_changes_in_place_take_nothing() -> None:
    x = torch.ones(MANY)
    assert memory_of(lambda: (x.view(-1, 10).mT, x.mul_(2))).peak < 100


def test_what_custom_functions_make_is_counted() -> None:
    class Wasteful(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(torch.empty(3 * MANY))
            return x * 2

        @staticmethod
        def backward(ctx: Any, slope: Tensor) -> Tensor:
            torch.empty(2 * MANY)
            return slope * 2

    x = torch.ones(10, requires_grad=True)

    def work() -> tuple[Tensor, ...]:
        return torch.autograd.grad(Wasteful.apply(x), x, torch.ones(10))

    assert memory_of(work).extra == pytest.approx(5_000_000, abs=200)


def test_what_operators_make_inside_is_counted() -> None:
    q = torch.randn(1, 2, 512, 8)
    mask = torch.ones(512, 512, dtype=torch.bool)
    plain = memory_of(lambda: (F.scaled_dot_product_attention(q, q, q),))
    masked = memory_of(lambda: (F.scaled_dot_product_attention(q, q, q, mask),))
    assert plain.extra > 0, "its buffers"
    assert masked.extra - plain.extra >= 4 * 512 * 512, "the numbers that it makes of a boolean mask"


def test_the_system_has_memory() -> None:
    assert 1e8 < available_memory() < 1e15


PROCESS = """
import sys
from pathlib import Path
from polyformer.bench.contestants import CONTESTANTS
from polyformer.bench.memory import memory_of
from polyformer.bench.work import HeadSizes, Work

def held(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))

name, mode, length = sys.argv[1:]
Work(CONTESTANTS[name], HeadSizes(), 128).runs(mode)()
work = Work(CONTESTANTS[name], HeadSizes(), int(length))
Path("/proc/self/clear_refs").write_text("5")  # the peak is counted anew
before = held("VmRSS")
answers = work.runs(mode)()
after = held("VmHWM")
del answers
work.forget()
print(after - before, memory_of(work.runs(mode)).peak)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("mode", ["forward", "training"])
@pytest.mark.parametrize("name", ["naive", "sdpa-window-256", "linear-attention"])
def test_the_process_grows_as_much(name: str, mode: str) -> None:
    """Where glibc gives each freed block back to the system at once; otherwise a process keeps some."""
    length = "2048" if name == "naive" else "4096"
    command = [sys.executable, "-c", PROCESS, name, mode, length]
    frugal = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=frugal)
    grown, counted = map(int, done.stdout.split())
    assert counted == pytest.approx(grown, rel=0.03, abs=6e6)
