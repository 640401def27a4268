"""Writing speed of the native runtime beside PyTorch, llama.cpp, and the time that reading the weights once takes.

    python benchmarks/generation.py [MODEL.gguf ...] [--json FILE] [--threads 2] [--rounds 5] [--forms q8,q4]

Three figures for each contender: tokens a second alone, of eight sequences at once (all together), and of a prompt of
512 tokens; behind each, how many times llama.cpp's figure that is. Contenders take turns, round after round, in one
process, so that the machine's moods reach all alike; the figures are medians. Beside each native form stand its share
of the bound, which is the speed at which memory is read (measured in every round, over 256 MB) divided by the bytes of
the matrices that a token needs, and the logit error: the distance of its scores from those of the file's weights in
single precision, ‖found - wanted‖ / ‖wanted‖, over a text. Several files, such as one model in several formats, are
measured one after the other.

On a machine that isn't quiet, `--busy` measures the processor's time of one thread in place of the clock's.

llama.cpp takes part where llama-cpp-python is installed (built for this machine: CMAKE_ARGS="-DGGML_NATIVE=ON").
"""

from __future__ import annotations

import argparse
import ctypes
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

import polyformer as pf
from polyformer.errors import PolyformerError
from polyformer.loaded.ready import ready_path
from polyformer.native.kinds import Precision
from polyformer.native.library import required
from polyformer.native.machine import Machine
from polyformer.native.program import Multiply
from polyformer.native.runner import NativeRunner, runner
from polyformer.parts.flow import StaticCache
from polyformer.weights.gguf import read_gguf

PROMPT, BATCH, ROOM = 512, 8, 1024
TEXT = "The history of the city goes back to Roman times, when a small town stood on the river. In the year"


SILENCE = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(lambda *_: None)


def prompt(vocabulary: int) -> list[int]:
    """Return tokens of no meaning."""
    return [(i * 7919) % (vocabulary - 1) + 1 for i in range(PROMPT)]


@dataclass
class Contender:
    """One that reads and writes.

    Attributes:
        alone, together: write one token of one sequence, and of eight, behind what was written before.
        read: reads a prompt of 512 tokens from the start.
        start: puts every sequence to a length of 32.
        bytes: of the matrices that a token needs; 0 if not known.
        error: of the logits.
    """

    name: str
    start: Callable[[], None]
    alone: Callable[[], None]
    together: Callable[[], None] | None
    read: Callable[[], None]
    bytes: int = 0
    error: float | None = None
    speeds: dict[str, list[float]] = field(default_factory=dict)
    clock: Callable[[], float] = time.perf_counter

    def round(self, tokens: int) -> None:
        """Time all three once; each figure is of the median step."""
        self.start()
        self._note("alone", 1, [self._seconds(self.alone) for _ in range(tokens)])
        if self.together is not None:
            self._note("together", BATCH, [self._seconds(self.together) for _ in range(max(tokens // 4, 3))])
        self._note("prompt", PROMPT, [self._seconds(self.read)])

    def _seconds(self, work: Callable[[], None]) -> float:
        start = self.clock()
        work()
        return self.clock() - start

    def _note(self, what: str, count: int, seconds: list[float]) -> None:
        self.speeds.setdefault(what, []).append(count / statistics.median(seconds))

    def median(self, what: str) -> float | None:
        """Return tokens a second."""
        return statistics.median(self.speeds[what]) if what in self.speeds else None


BITS = {"F32": 32, "F16": 32, "Q8_0": 8.5, "Q6_K": 8.5, "Q4_0": 4.5, "Q4_1": 5, "Q4_K": 5}


def bytes_read(run: NativeRunner, weights: Precision, types: dict[str, tuple[str, tuple[int, ...]]]) -> int:
    """Return the bytes of all matrices that a token is multiplied by, as they are packed."""
    program = run.state.model.program
    paths = {matrix for one in program.write if isinstance(one, Multiply) for matrix in one.matrices}
    shapes = {one.path: one.shape for one in program.weights}
    if weights == "as stored":
        # A table of tokens that is not the head too gives one row a token.
        read = [one for name, one in types.items() if name != "token_embd.weight" or "output.weight" not in types]
        kinds = {kind: sum(np.prod(shape) for k, shape in read if k == kind) for kind, _ in read}
        return int(sum(BITS[kind] / 8 * float(count) for kind, count in kinds.items() if kind in BITS))
    bits = {"fp32": 32.0, "q8": 8.5, "q4": 5.0}[weights]
    return int(sum(bits / 8 * float(np.prod(shapes[path])) for path in paths))


def native(file: Path, weights: Precision, threads: int, ids: list[int], wanted: torch.Tensor) -> Contender:
    """Return the native runtime on the file's weights."""
    run = runner(file, weights, Machine(slots=BATCH + 1, room=ROOM, threads=threads))
    state, types = run.state, dict(read_gguf(file).types)
    state.step(ids, [0] * len(ids), range(len(ids)), [])
    state.clear(0)
    found = torch.from_numpy(state.step(ids, [0] * len(ids), range(len(ids)), range(len(ids))))
    given = prompt(run.vocabulary)

    def start() -> None:
        for slot in range(BATCH):
            state.clear(slot)
            state.step(given[:32], [slot] * 32, range(32), [])

    def alone() -> None:
        state.step([5], [0], [state.length(0)], [0])

    def together() -> None:
        state.step([5] * BATCH, range(BATCH), [state.length(slot) for slot in range(BATCH)], range(BATCH))

    def read() -> None:
        state.clear(BATCH)
        state.step(given, [BATCH] * PROMPT, range(PROMPT), [PROMPT - 1])

    error = float((found - wanted).norm() / wanted.norm())
    size = bytes_read(run, weights, types)
    return Contender(f"native, {weights}", start, alone, together, read, size, error)


def pytorch(model: Any) -> Contender:
    """Return this library's own modules, operator by operator, in single precision."""
    vocabulary = model.head.projection.spec.outputs
    given = torch.tensor([prompt(vocabulary)])
    caches: dict[int, StaticCache] = {}

    def forward(ids: torch.Tensor, cache: StaticCache) -> None:
        with torch.inference_mode():
            model.head(model.decode(ids, cache=cache)[:, -1:], None)

    def start() -> None:
        for batch in (1, BATCH):
            caches[batch] = StaticCache(room=ROOM)
            forward(given[:, :32].expand(batch, -1), caches[batch])

    return Contender(
        "PyTorch, fp32",
        start,
        lambda: forward(torch.full((1, 1), 5), caches[1]),
        lambda: forward(torch.full((BATCH, 1), 5), caches[BATCH]),
        lambda: forward(given, StaticCache(room=PROMPT)),
    )


def llama_cpp(file: Path, threads: int) -> Contender | None:
    """Return llama.cpp on the same file, or None where it isn't installed."""
    try:
        import llama_cpp as peer
    except ImportError:
        return None
    peer.llama_log_set(SILENCE, None)
    peer.llama_backend_init()
    model = peer.llama_model_load_from_file(str(file).encode(), peer.llama_model_default_params())
    settings = peer.llama_context_default_params()
    settings.n_ctx, settings.n_batch, settings.n_ubatch, settings.n_seq_max = ROOM * 9, PROMPT, PROMPT, BATCH + 1
    settings.n_threads = settings.n_threads_batch = threads
    context = peer.llama_init_from_model(model, settings)
    memory, batch = peer.llama_get_memory(context), peer.llama_batch_init(PROMPT, 0, 1)
    given = prompt(peer.llama_vocab_n_tokens(peer.llama_model_get_vocab(model)))
    lengths = [0] * (BATCH + 1)

    def step(ids: list[int], slots: list[int], wanted: Callable[[int], bool]) -> None:
        batch.n_tokens = len(ids)
        for i, (token, slot) in enumerate(zip(ids, slots, strict=True)):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0] = token, lengths[slot], 1, slot
            batch.logits[i] = wanted(i)
            lengths[slot] += 1
        if peer.llama_decode(context, batch):
            raise RuntimeError("llama.cpp failed")
        peer.llama_get_logits(context)

    def clear(slot: int) -> None:
        peer.llama_memory_seq_rm(memory, slot, -1, -1)
        lengths[slot] = 0

    def start() -> None:
        for slot in range(BATCH):
            clear(slot)
            step(given[:32], [slot] * 32, lambda i: i == 31)

    def read() -> None:
        clear(BATCH)
        step(given, [BATCH] * PROMPT, lambda i: i == PROMPT - 1)

    everyone = list(range(BATCH))
    return Contender(
        "llama.cpp, as stored",
        start,
        lambda: step([5], [0], lambda i: True),
        lambda: step([5] * BATCH, everyone, lambda i: True),
        read,
    )


def bandwidth(numbers: np.ndarray, threads: int, clock: Callable[[], float]) -> float:
    """Return the bytes a second at which memory is read."""
    start = clock()
    required().pf_sum(numbers.ctypes.data, numbers.size, threads)
    return numbers.nbytes / (clock() - start)


def main() -> None:
    """Measure and print."""
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("models", type=Path, nargs="*", default=[Path("smollm2")])
    asked.add_argument("--json", type=Path)
    asked.add_argument("--threads", type=int, default=2)
    asked.add_argument("--rounds", type=int, default=5)
    asked.add_argument("--tokens", type=int, default=48)
    asked.add_argument("--forms", default="as stored,q8,q4,fp32")
    asked.add_argument("--busy", action="store_true")
    given = asked.parse_args()
    given.threads = 1 if given.busy else given.threads
    torch.set_num_threads(given.threads)
    found = []
    for model in given.models:
        try:
            found.append(measured(ready_path(model), given))
        except PolyformerError as error:
            print(error)
    if given.json is not None and found:
        given.json.write_text(json.dumps(found, indent=1) + "\n")


def measured(file: Path, given: argparse.Namespace) -> dict[str, Any]:
    """Measure one file, print its table, and return it."""
    clock = time.thread_time if given.busy else time.perf_counter
    loaded = pf.load(file)
    ids = loaded.texts.encode(TEXT)
    with torch.inference_mode():
        wanted = loaded.model(input_ids=torch.tensor([ids])).logits[0]
    contenders = [native(file, form, given.threads, ids, wanted) for form in given.forms.split(",")]
    contenders.append(pytorch(loaded.model))
    peer = llama_cpp(file, given.threads)
    contenders += [] if peer is None else [peer]
    numbers = np.ones(2**26, dtype=np.float32)
    speeds = []
    for _ in range(given.rounds):
        for one in contenders:
            one.clock = clock
            one.round(given.tokens)
            speeds.append(bandwidth(numbers, given.threads, clock))
    return report(file, contenders, peer, statistics.median(speeds))


def report(file: Path, contenders: list[Contender], peer: Contender | None, speed: float) -> dict[str, Any]:
    """Print the table, and return it."""
    print(f"{file.name}: memory is read at {speed / 1e9:.1f} GB/s; tokens a second, medians (times llama.cpp's)")
    print(f"{'':22}{'alone':>17}{'of bound':>10}{'8 at once':>17}{'prompt':>17}{'logit error':>13}")
    rows: list[dict[str, Any]] = []
    for one in contenders:
        found = {what: one.median(what) for what in ("alone", "together", "prompt")}
        ratios = {what: ratio(found[what], peer and peer.median(what)) for what in found}
        bound = None if not one.bytes else (found["alone"] or 0) * one.bytes / speed
        row = {
            "name": one.name,
            **found,
            "times llama.cpp": ratios,
            "share of the bound": bound,
            "logit error": one.error,
        }
        rows.append(row)
        alone, together, read = (cell(found[what], ratios[what]) for what in found)
        share, error = f"{bound:.0%}" if bound else "", "" if one.error is None else f"{one.error:.2%}"
        print(f"{one.name:22}{alone:>17}{share:>10}{together:>17}{read:>17}{error:>13}")
    return {"file": file.name, "bytes a second": speed, "contenders": rows}


def ratio(found: float | None, peer: float | None) -> float | None:
    """Return how many times the peer's figure it is."""
    return found / peer if found and peer else None


def cell(found: float | None, times: float | None) -> str:
    """Return a figure, and how many times the peer's it is."""
    return "" if found is None else f"{found:.1f}" + ("" if times is None else f" ({times:.2f} ×)")


if __name__ == "__main__":
    main()
