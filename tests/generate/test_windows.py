"""Attention to windows in the engine: answers across a window's border, in memory that stops growing.

What the answers are held against is the plain model, which reads the whole text anew for every token.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch

from polyformer.errors import PolyformerError
from polyformer.generate import (
    Capacity,
    Engine,
    PromptLookup,
    Request,
    Rows,
    Runner,
    Sampling,
    Speculation,
    TorchRunner,
)
from polyformer.generate.slots import BLOCK, RETRACTS, room_behind
from polyformer.native.library import library
from polyformer.native.machine import Machine
from polyformer.native.runner import runner
from polyformer.parts import (
    Attention,
    Causal,
    Chain,
    Embed,
    FeedForward,
    LayerNorm,
    LMHead,
    Residual,
    Rotary,
    Stack,
    TokenEmbedding,
    Transformer,
    Window,
)
from polyformer.parts.model import TransformerPart
from tests.generate.writers import VOCABULARY, ids

WIDTH = 70
LONG = 640
WINDOWS = {
    "all in windows": (Window(WIDTH), Window(WIDTH)),
    "in turns": (Window(WIDTH), None),
    "two widths": (Window(9), Window(40)),
    "leaving keys out": (Window(9), Window(23, 3)),
}


def model_of(kind: str, dtype: torch.dtype = torch.float64) -> TransformerPart:
    """Build a model of two layers, each with its window, whose answers differ much."""
    torch.manual_seed(3)
    blocks = []
    for window in WINDOWS[kind]:
        attention = Attention.of_width(16, 2, Causal() if window is None else Causal() & window)
        steps = attention.replace(position=Rotary(8)), FeedForward.of_widths(16, 32)
        blocks.append(Chain(tuple(Residual(step, pre=LayerNorm(16)) for step in steps)))
    spec = Transformer(
        target=Embed(TokenEmbedding(VOCABULARY, 16)),
        decoder=Stack(tuple(blocks), LayerNorm(16)),
        head=LMHead.of_width(16, VOCABULARY),
    )
    model = spec.build(dtype=torch.float64)
    assert isinstance(model, TransformerPart)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return model.to(dtype).eval()


TEXT = ids(LONG, 5)


@functools.cache
def wanted(kind: str) -> torch.Tensor:
    """Return the plain model's scores for the whole text."""
    with torch.no_grad():
        logits = model_of(kind)(input_ids=torch.tensor([TEXT])).logits
    assert logits is not None
    return logits[0]


@functools.cache
def continued(kind: str, count: int) -> list[int]:
    """Return what the plain model writes behind the first `count` tokens of the text."""
    model, text = model_of(kind), TEXT[:count]
    with torch.no_grad():
        for _ in range(12):
            logits = model(input_ids=torch.tensor([text])).logits
            assert logits is not None
            text = [*text, int(logits[0, -1].argmax())]
    return text[count:]


def in_pytorch(kind: str, slots: int) -> Runner:
    """Return what runs a model in PyTorch."""
    return TorchRunner(model_of(kind), slots)


def natively(kind: str, slots: int) -> Runner:
    """Return what runs a model natively."""
    if kind == "leaving keys out":
        pytest.skip("has no lowering")
    return runner(model_of(kind, torch.float32), "fp32", Machine(slots, 1024, 2))


kinds = pytest.mark.parametrize("kind", WINDOWS)
compiled = pytest.mark.skipif(library() is None, reason="the native runtime is not compiled here")
runners = pytest.mark.parametrize(
    "make", [in_pytorch, pytest.param(natively, marks=compiled)], ids=["pytorch", "native"]
)
Make = Callable[[str, int], Runner]


def read(runner: Runner, slot: int, cuts: list[int]) -> torch.Tensor:
    """Read the text in pieces; return the scores behind each of its tokens."""
    found, start = [], runner.length(slot)
    for count in cuts:
        places = list(range(start, start + count))
        rows = Rows([slot] * count, places, TEXT[start : start + count])
        found.append(torch.as_tensor(runner.step(rows, list(range(count)))))
        start += count
    return torch.cat(found)


def apart(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Return the largest difference, as a share of the largest score."""
    return float((found - wanted).abs().max() / wanted.abs().max())


@kinds
@runners
@pytest.mark.parametrize("cuts", [[LONG], [400, 3, 237], [69, 70, 71, 1, 1, 64, 65, 299], [500] + [1] * 140])
def test_pieces_of_any_size(kind: str, make: Make, cuts: list[int]) -> None:
    assert apart(read(make(kind, 1), 0, cuts), wanted(kind)) < 1e-5


@kinds
@runners
def test_memory_stops_growing(kind: str, make: Make) -> None:
    """What is foretold is never less than what is taken, and with windows only, it is the same from some length on."""
    state, taken = make(kind, 1), []
    for _ in range(LONG // 16):
        read(state, 0, [16])
        taken.append(state.bytes)
        assert state.bytes <= state.bytes_for(state.length(0))
    if kind == "in turns":
        both = state.bytes_for(BLOCK) - state.bytes_for(0)
        assert state.bytes_for(10**6) < 0.51 * both * 10**6 / BLOCK
    else:
        assert taken[-1] <= max(taken[: 3 * len(taken) // 4])
        assert state.bytes_for(10**6) == state.bytes_for(10**5)


@kinds
@runners
def test_tokens_are_taken_back(kind: str, make: Make) -> None:
    """From wherever a text has come to, and however it was read, up to as many as guesses may be."""
    state = make(kind, 2)
    for cuts in ([600], [500] + [1] * 100):
        state.truncate(0, 0)
        read(state, 0, cuts)
        assert state.earliest(0) <= state.length(0) - state.retracts
        for back in (1, state.retracts - 1, state.retracts):
            at = 600 - back
            state.copy(0, 1, at)
            assert apart(read(state, 1, [5]), wanted(kind)[at : at + 5]) < 1e-5
        state.truncate(0, at)
        assert apart(read(state, 0, [1, 70, 2]), wanted(kind)[at : at + 73]) < 1e-5
    for refused in (lambda: state.truncate(0, 3), lambda: state.copy(0, 1, 3)):
        with pytest.raises(PolyformerError, match=r"can't be (cut back|copied up) to 3|has forgotten what a text of 3"):
            refused()
    state.truncate(0, 0)
    assert apart(read(state, 0, [3]), wanted(kind)[:3]) < 1e-5


@kinds
@runners
def test_with_others_guesses_and_little_memory(kind: str, make: Make) -> None:
    """Texts that go on across the border of the window, in pieces, some beginning as others did."""
    lengths = [3, WIDTH - 6, WIDTH, 150, 231, 430, 600]
    state = make(kind, 4)
    engine = Engine(
        state, Capacity(3 * state.bytes_for(LONG), 32, kept=1), PromptLookup(1), Speculation(8, trial=10**6)
    )
    handles = [engine.submit(Request(TEXT[:count], Sampling(limit=12))) for count in lengths]
    while engine.step():
        assert engine.bytes <= 3 * state.bytes_for(LONG)
    assert [one.result().ids for one in handles] == [continued(kind, count) for count in lengths]
    assert engine.guesses.guessed > engine.guesses.taken > 0
    engine.forget()
    assert engine.bytes == 0


@kinds
@runners
def test_a_conversation_goes_on(kind: str, make: Make) -> None:
    """What was said is not computed anew, though most of its keys are gone; what can't be used again isn't."""
    engine = Engine(make(kind, 2), Capacity(kept=1))
    assert engine.submit(Request(TEXT[:600], Sampling(limit=12))).result().ids == continued(kind, 600)
    on = engine.submit(Request(TEXT[:605], Sampling(limit=12))).result()
    assert (on.reused, on.ids) == (600, continued(kind, 605))
    branch = engine.submit(Request(TEXT[:130], Sampling(limit=12))).result()
    assert (branch.reused, branch.ids) == (0, continued(kind, 130))


def test_room() -> None:
    assert room_behind(WIDTH - 1) % BLOCK == 0
    assert room_behind(WIDTH - 1) >= WIDTH - 1 + RETRACTS + BLOCK
