"""Mixture of experts natively: capacity is counted for each text, and other experts' weights are never read."""

from __future__ import annotations

import math

import pytest
import torch

from polyformer import parts
from polyformer.generate import Rows, TorchRunner
from polyformer.native.builder import LoweringError
from polyformer.native.given import from_tensors
from polyformer.native.interpreter import Interpreter
from polyformer.native.kinds import kinds_for
from polyformer.native.lowering import lower
from polyformer.native.machine import Machine, NativeModel, NativeState
from polyformer.native.runner import runner
from polyformer.parts.model import TransformerPart
from tests.native.cases import apart, compiled

VOCABULARY, WIDTH = 23, 16


def spec_of(**changes: object) -> parts.Transformer:
    """Return a decoder with one layer of six experts, and one beside them that is gated."""
    experts = parts.Experts.of(parts.FeedForward.gated(WIDTH, 40), WIDTH, 6, 2).replace(**changes)
    shared = parts.Gated(parts.FeedForward.gated(WIDTH, 24), parts.Linear(WIDTH, 1))
    attention = parts.Attention.of_width(WIDTH, 2, parts.Causal()).replace(position=parts.Rotary(8))
    steps = (attention, parts.Branches((experts, shared)))
    block = parts.Chain(tuple(parts.Residual(step, pre=parts.RMSNorm(WIDTH)) for step in steps))
    embed = parts.Embed(parts.TokenEmbedding(VOCABULARY, WIDTH))
    return parts.Transformer(target=embed, decoder=parts.Stack((block,)), head=parts.LMHead.of_width(WIDTH, VOCABULARY))


def model_of(**changes: object) -> TransformerPart:
    """Build it with random weights."""
    torch.manual_seed(1)
    model = spec_of(**changes).build()
    assert isinstance(model, TransformerPart)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return model.eval()


@compiled
@pytest.mark.parametrize("weights", ["all", "chosen"])
def test_capacity_is_that_of_each_text_in_a_step(weights: str) -> None:
    """Two texts in one step are answered as alone, in PyTorch and natively, and what is too much is left out."""
    model = model_of(capacity=2, weights=weights)
    text = [3, 7, 7, 7, 1, 9, 7, 2]
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([text])).logits
    assert logits is not None
    together = Rows([0] * 8 + [1] * 8, [*range(8)] * 2, text * 2)
    native = runner(model, "fp32", Machine(slots=2, room=16))
    for run in (TorchRunner(model, 2), native):
        found = torch.as_tensor(run.step(together, list(range(16))))
        assert apart(found[:8], logits[0]) < 1e-5
        assert apart(found[8:], logits[0]) < 1e-5
    plain = Interpreter(lower(model.spec), dict(model.state_dict()))
    assert apart(plain.step(text, [0] * 8, list(range(8)), list(range(8))), logits[0]) < 1e-5
    boundless = model_of(weights=weights)
    with torch.no_grad():
        other = boundless(input_ids=torch.tensor([text])).logits
    assert other is not None
    assert apart(other[0], logits[0]) > 1e-3


@compiled
@pytest.mark.parametrize("held", ["fp32", "q8"])
def test_only_the_chosen_experts_are_read(held: str) -> None:
    """With weights that are no numbers in all that a text doesn't ask for, its scores are the same.

    Routers stay in floats whatever the rest is held in, so that the same experts are chosen.
    """
    model = model_of()
    program, tensors = lower(model.spec), dict(model.state_dict())
    asked: set[int] = set()
    router = model.decoder.blocks[0].steps[1].op.steps[0].router  # type: ignore[union-attr, index, operator]
    router.register_forward_hook(lambda _, __, out: asked.update(out.flatten(0, -2).topk(2).indices.flatten().tolist()))
    with torch.no_grad():
        model(input_ids=torch.tensor([[5]]))
    assert len(asked) == 2
    spoiled = {
        path: torch.full_like(one, math.nan) if ".experts." in path and int(path.split(".")[9]) not in asked else one
        for path, one in tensors.items()
    }
    assert any(bool(one.isnan().any()) for one in spoiled.values())
    found = []
    for given in (tensors, spoiled):
        made = NativeModel(program, from_tensors(program, given, 16), kinds_for(program, held), 16)  # type: ignore[arg-type]
        found.append(torch.from_numpy(NativeState(made, Machine(room=16)).step([5], [0], [0], [0])))
    assert found[0].equal(found[1])


def test_experts_that_are_not_lowered() -> None:
    plain = parts.FeedForward.of_widths(WIDTH, 24)
    for experts, told in (
        ((plain, plain.replace(activation="gelu")), "all alike"),
        ((parts.RMSNorm(WIDTH),) * 2, "feed-forward networks"),
        ((plain.replace(up=parts.Chain((plain.up,))),) * 2, "only plain matrices"),
    ):
        with pytest.raises(LoweringError, match=told):
            lower(spec_of(experts=experts, router=parts.Linear(WIDTH, 2), chosen=1))
