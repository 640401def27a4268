"""The native run against the plain interpreter, against itself in other company, and against bad input."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from polyformer.errors import RunError
from polyformer.native.given import from_tensors
from polyformer.native.interpreter import Interpreter
from polyformer.native.lowering import lower
from polyformer.native.machine import KINDS, Given, Kind, Machine, NativeModel, NativeState
from polyformer.native.program import CacheShape, Multiply, PickRows, Program, TakeTokens, Weight
from polyformer.native.runner import runner
from polyformer.weights.dequantise import dequantise
from polyformer.weights.ggml import FORMATS
from tests.families.cases import Case
from tests.native.cases import LOWERED, ROOM, apart, compiled, length_of, load, lowered, native, run, tensors_of, texts
from tests.weights.gguf_writer import FORMAT, random_blocks

pytestmark = compiled
some = pytest.mark.parametrize(
    "case", [case for case in LOWERED if case.name in ("llama", "gpt2", "t5", "mixtral")], ids=str
)


@lowered
@pytest.mark.parametrize("kernels", ["best", "portable"])
def test_the_same_as_the_interpreter(case: Case, kernels: str) -> None:
    loaded = load(case)
    plain = Interpreter(lower(loaded.spec), tensors_of(loaded))
    state, length = native(loaded, kernels=kernels), length_of(case)
    for cuts in ([length], [2, *[1] * (length - 2)]):
        plain.clear(0)
        state.clear(0)
        assert apart(run(state, case, cuts), run(plain, case, cuts)) < 2e-6


@some
@pytest.mark.parametrize(("cache", "tolerance"), [("f16", 1e-3), ("i8", 2e-2)])
def test_smaller_caches_are_close(case: Case, cache: str, tolerance: float) -> None:
    loaded = load(case)
    wanted = run(native(loaded), case, [length_of(case)])
    smaller = native(loaded, cache=cache)
    assert apart(run(smaller, case, [length_of(case)]), wanted) < tolerance
    assert smaller.bytes_for(ROOM) < native(loaded).bytes_for(ROOM) or smaller.bytes_for(ROOM) <= 4096 * 40


@some
@pytest.mark.parametrize(("weights", "tolerance"), [("q8", 5e-2), ("q4", 4e-1)])
def test_coded_weights_are_the_same_on_every_path(case: Case, weights: str, tolerance: float) -> None:
    """Eight and four bits round these tiny random models coarsely; both kinds of kernels must round them alike."""
    loaded, length = load(case), length_of(case)
    wanted = run(native(loaded), case, [length])
    best = run(native(loaded, weights), case, [length])  # type: ignore[arg-type]
    portable = run(native(loaded, weights, kernels="portable"), case, [1] * length)  # type: ignore[arg-type]
    assert apart(best, wanted) < tolerance
    assert apart(best, portable) < 1e-5


@some
@pytest.mark.parametrize("weights", ["fp32", "q8", "q4"])
@pytest.mark.parametrize("threads", [1, 3])
def test_company_changes_nothing(case: Case, weights: str, threads: int) -> None:
    """A sequence's scores are the same bit for bit: alone or with others, in one piece or several, however many
    threads there are."""
    loaded, length = load(case), length_of(case)
    alone = native(loaded, weights, threads=2)  # type: ignore[arg-type]
    together = native(loaded, weights, slots=3, threads=threads)  # type: ignore[arg-type]
    reads, writes = texts(case)
    wanted = []
    for row in range(3):
        alone.clear(0)
        wanted.append(run(alone, case, [length], row))
        if reads:
            together.read(reads[row], row)
    found: list[list[torch.Tensor]] = [[], [], []]
    for places in ((0, 1), (2,), tuple(range(3, length))):
        rows = [(writes[slot][place], slot, place) for slot in range(3) for place in places]
        scores = torch.from_numpy(together.step(*map(list, zip(*rows, strict=True)), list(range(len(rows)))))
        for slot, share in enumerate(scores.chunk(3)):
            found[slot].append(share)
    for one, other in zip(found, wanted, strict=True):
        assert torch.cat(one).equal(other)


@some
def test_slots_are_copied_cut_back_and_cleared(case: Case) -> None:
    loaded, length = load(case), length_of(case)
    _, writes = texts(case)
    for cache in ("f32", "f16", "i8"):
        state = native(loaded, slots=2, cache=cache)
        wanted = run(state, case, [length])[-1]
        state.copy(0, 1, length - 2)
        assert state.length(1) == length - 2
        rest = list(range(length - 2, length))
        again = state.step([writes[0][i] for i in rest], [1, 1], rest, [1])
        assert torch.from_numpy(again[0]).equal(wanted)
        state.truncate(0, length - 1)
        again = state.step([writes[0][length - 1]], [0], [length - 1], [0])
        assert torch.from_numpy(again[0]).equal(wanted)
        assert state.bytes > 0
        for slot in range(2):
            state.clear(slot)
            assert state.length(slot) == 0
        assert state.bytes <= native(loaded).bytes_for(0, 0) + 4096 * 40  # what the encoder works with stays


def product(kind: Kind, given: Given, rows: np.ndarray, kernels: str) -> np.ndarray:
    """Multiply rows by one matrix [N, K] through a program made by hand; the rows are a table of tokens."""
    outputs, inputs = given.rows if given.order is None else len(given.order), given.columns
    weights = (Weight("x", rows.shape), Weight("w", (outputs, inputs)))
    steps = (TakeTokens(0, "x"), PickRows(1, 0), Multiply((2,), 1, ("w",), ("",)))
    program = Program(outputs, (inputs, inputs, outputs), weights, (CacheShape(1, 1),), (), steps)
    table = Given("F32", rows.astype(np.float32).view(np.uint8).reshape(-1), *rows.shape)
    tensors = {"x": table, "w": given}
    model = NativeModel(program, tensors.__getitem__, lambda path, given: "f32" if path == "x" else kind, 16)
    state = NativeState(model, Machine(room=16, kernels=kernels, threads=2))  # type: ignore[arg-type]
    many = list(range(len(rows)))
    return state.step(many, [0] * len(rows), many, many)


@pytest.mark.parametrize("kernels", ["best", "portable"])
@pytest.mark.parametrize("rows", [1, 2, 3, 7, 13])
@pytest.mark.parametrize("kind", KINDS)
def test_products_of_every_kind(kind: Kind, rows: int, kernels: str) -> None:
    """Odd sizes, and rows whose numbers are whole up to 127, so that only the matrix is rounded."""
    chance = np.random.default_rng(rows)
    matrix = chance.standard_normal((37, 72)).astype(np.float32)
    x = chance.integers(-127, 128, (rows, 72)).astype(np.float32)
    x[:, ::32] = 127
    given = Given("F32", matrix.view(np.uint8).reshape(-1), 37, 72)
    found, wanted = product(kind, given, x, kernels), x @ matrix.T
    levels = {"f32": 1e-6, "q8": 1 / 127, "q8m": 1 / 127, "q4": 1 / 7, "q4m": 1 / 7}[kind]
    assert np.abs(found - wanted).max() < 1e-5 + levels * 3 * 127 * np.sqrt(72)


@pytest.mark.parametrize("kernels", ["best", "portable"])
@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q8_0", "Q4_K", "Q6_K"])
def test_stored_blocks_mean_what_they_mean_elsewhere(name: str, kernels: str) -> None:
    """Against the floats that the file's reader makes of the same bytes, with rows in another order."""
    kind = FORMAT[name]
    blocks = random_blocks(kind, 24 * 512 // kind.weights)
    matrix = dequantise(FORMATS[kind.code], blocks.view(-1), (24, 512)).numpy()
    order = np.random.default_rng(0).permutation(24)[:21].astype(np.int64)
    x = np.random.default_rng(1).integers(-127, 128, (5, 512)).astype(np.float32)
    x[:, ::32] = 127
    own: Kind = "q8" if name in ("Q8_0", "Q6_K") else "q4" if name == "Q4_0" else "q4m"
    given = Given(name, blocks.numpy().reshape(-1), 24, 512, order)
    wanted = x @ matrix[order].T
    share = {"Q4_K": 2e-3, "Q6_K": 1e-2}.get(name, 1e-5)  # whose scales are rounded, or whose groups are joined
    assert np.abs(product(own, given, x, kernels) - wanted).max() < share * np.abs(wanted).max()
    assert np.abs(product("f32", given, x, kernels) - wanted).max() < 1e-5 * np.abs(wanted).max()


def test_a_runner_refuses_in_one_sentence_and_keeps_what_it_holds() -> None:
    loaded = load(LOWERED[0])
    run = runner(loaded.model, "fp32", Machine(slots=2, room=ROOM))
    state = run.state
    state.step([1, 2], [0, 0], [0, 1], [])
    for given, told in (
        (([1], [2], [0], []), "there is no slot 2; there are 2"),
        (([1], [-1], [0], []), "there is no slot -1; there are 2"),
        (([50], [0], [2], []), "there is no token 50 in a vocabulary of 50"),
        (([-1], [0], [2], []), "there is no token -1 in a vocabulary of 50"),
        (([1], [0], [3], []), "slot 0 holds 2 tokens; the next can't stand at place 3"),
        (([1, 1], [0, 0], [1, 1], []), "slot 0 holds 2 tokens; the next can't stand at place 1"),
        (([1], [0], [2], [1]), "scores are wanted of a row that isn't there"),
        (([1] * 33, [0] * 33, list(range(33)), []), "place 32 is beyond the room for 32 tokens"),
        (([], [], [], []), "a step takes 1 to 65536 tokens"),
        (([1], [0, 0], [2], []), "1 tokens need as many slots and places, not 2 and 1"),
    ):
        with pytest.raises(RunError, match=told):
            state.step(*given)  # type: ignore[arg-type]
        assert state.length(0) == 2
    for call, told in (
        (lambda: run.truncate(0, 3), "slot 0 holds no 3 tokens"),
        (lambda: run.copy(0, 5, 1), "there is no slot 5"),
        (lambda: run.read({0: [1]}), "this program reads no text"),
        (lambda: runner(loaded.model, "fp32", Machine(room=0)), "there can be room for 1 to 2.22 tokens"),
        (lambda: runner(loaded.model, "fp32", Machine(threads=0)), "there can be 1 to 256 threads, not 0"),
    ):
        with pytest.raises(RunError, match=told):
            call()
    assert run.positions == 32
    assert run.vocabulary == 50
    assert run.earliest(0) == 1


def test_a_slot_that_has_read_nothing_can_t_write() -> None:
    case = next(case for case in LOWERED if case.name == "t5")
    with pytest.raises(RunError, match="slot 0 has read no text to look at"):
        native(load(case)).step([1], [0], [0], [])


def test_weights_must_fit_the_program() -> None:
    loaded = load(LOWERED[0])
    program, tensors = lower(loaded.spec), tensors_of(loaded)
    path = program.weights[0].path
    for wrong, told in (
        (torch.zeros(50, 17), "rows of 17"),
        (torch.zeros(49, 16), "another number of rows"),
        (None, f"reads {path}, which is not among"),
    ):
        kept = {name: one for name, one in tensors.items() if name != path}
        given = from_tensors(program, kept if wrong is None else kept | {path: wrong}, ROOM)
        with pytest.raises(RunError, match=told):
            NativeModel(program, given, lambda path, given: "f32", ROOM)
