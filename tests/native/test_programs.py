"""Specs lowered to programs: what the plain interpreter makes of them is what the model says itself."""

from __future__ import annotations

import re

import pytest
import torch

from polyformer import parts
from polyformer.errors import RunError, SpecError
from polyformer.native.builder import LoweringError
from polyformer.native.interpreter import Interpreter
from polyformer.native.lowering import lower
from polyformer.native.program import Multiply, Program, read_by, written_by
from tests.families.cases import CASES, Case
from tests.native.cases import WRITERS, answers, apart, length_of, load, lowered, run, tensors_of


@lowered
def test_programs_say_what_the_model_says(case: Case) -> None:
    loaded = load(case)
    program = lower(loaded.spec)
    interpreter = Interpreter(program, tensors_of(loaded), slots=2)
    length = length_of(case)
    for row, cuts in enumerate(([length], [2, length - 2], [1] * length)):
        interpreter.clear(1)
        assert apart(run(interpreter, case, cuts, row, slot=1), answers(case, loaded, row)) < 2e-6


@pytest.mark.parametrize("case", WRITERS, ids=str)
def test_what_is_lowered_and_what_is_not(case: Case) -> None:
    reasons = {
        ("reformer",): r"target.positions \(Axial\): there is no lowering for it",
        ("bert-lm", "roberta-lm", "electra-lm", "big_bird"): r"target \(Embed\): it reads token_type_ids beside tokens",
    }
    wanted = next((told for names, told in reasons.items() if case.name.startswith(names)), None)
    if wanted is None:
        assert lower(load(case).spec).write
    else:
        with pytest.raises(LoweringError, match=wanted):
            lower(load(case).spec)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("bert", "this one has no decoder"),
        ("gpt2-base", "it has no head"),
        ("gpt2-sequence", "only a head that scores next tokens"),
        ("llama-dynamic", "position .Rotary.: its angles depend on the length of the text"),
    ],
)
def test_what_has_no_program_says_why(name: str, told: str) -> None:
    case = next(case for case in CASES if case.name == name)
    with pytest.raises(LoweringError, match=told):
        lower(load(case).spec)


def toy(**changes: object) -> parts.Transformer:
    """A decoder of two layers."""
    see = parts.Causal() & parts.SameDocument()
    attention = parts.Attention.of_width(16, 4, see).replace(**changes)
    thinking = parts.FeedForward.of_widths(16, 24)
    block = parts.Chain(tuple(parts.Residual(op, pre=parts.LayerNorm(16)) for op in (attention, thinking)))
    return parts.Transformer(
        target=parts.Embed(parts.TokenEmbedding(19, 16), parts.Sinusoidal(16)),
        decoder=parts.Stack((block, block), parts.LayerNorm(16)),
        head=parts.LMHead.of_width(16, 19),
    )


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"kernel": parts.Performer(4, 8)}, "only exact softmax attention"),
        ({"position": parts.Shaw(4)}, r"decoder\.blocks\.0\.steps\.0\.op\.position \(Shaw\)"),
        ({"see": parts.Everyone()}, "a decoder that looks ahead"),
        ({"see": parts.Causal() & parts.Window(4, 2)}, "a window that leaves keys out"),
    ],
)
def test_parts_without_a_lowering_are_named(changes: dict[str, object], told: str) -> None:
    with pytest.raises(LoweringError, match=told):
        lower(toy(**changes))


def test_q_k_v_and_gate_with_up_are_one_product() -> None:
    case = next(case for case in WRITERS if case.name == "llama")
    products = [one for one in lower(load(case).spec).write if isinstance(one, Multiply)]
    assert [len(one.outs) for one in products] == [3, 1, 2, 1] * 2 + [1]


@lowered
def test_registers_are_reused_and_never_read_too_early(case: Case) -> None:
    program = lower(load(case).spec)
    most = max(len(program.registers), 1)
    assert most <= 8 + 2 * len(program.caches) * bool(program.read) + 4 + 6 * bool(program.choices)
    for part in (program.read, program.write):
        written: set[int] = set()
        for one in part:
            assert set(read_by(one)) <= written
            written |= set(written_by(one))


def test_programs_are_data() -> None:
    for case in (WRITERS[0], next(case for case in WRITERS if case.name == "t5")):
        program = lower(load(case).spec)
        assert Program.from_json(program.to_json()) == program


def test_a_printed_program_tells_equal_layers_once() -> None:
    told = lower(toy()).told()
    assert "2 times, here the first:" in told
    assert told.count("look") == 1
    assert re.search(r"r\d, r\d, r\d = multiply r\d decoder\.blocks\.0\.steps\.0\.op\.q\.weight", told)


def test_the_interpreter_refuses_what_can_t_be() -> None:
    spec = toy()
    run = Interpreter(lower(spec), dict(spec.build().state_dict()), slots=1)
    run.step([1, 2], [0, 0], [0, 1], [])
    for given, told in (
        (([1], [1], [0], []), "there is no slot 1; there are 1"),
        (([19], [0], [2], []), "there is no token 19 in a vocabulary of 19"),
        (([1], [0], [3], []), "slot 0 holds 2 tokens; the next can't stand at place 3"),
        (([1, 1], [0, 0], [1, 1], []), "slot 0 holds 2 tokens; the next can't stand at place 1"),
        (([1], [0], [2], [1]), "scores are wanted of a row that isn't there"),
    ):
        with pytest.raises(RunError, match=told):
            run.step(*given)
    assert run.length(0) == 2
    with pytest.raises(RunError, match=r"the program reads target.tokens.weight, which is not among the weights"):
        Interpreter(lower(spec), {})
    assert torch.isfinite(run.step([3], [0], [2], [0])).all()
    with pytest.raises(SpecError):
        lower(spec.head)  # type: ignore[arg-type]
