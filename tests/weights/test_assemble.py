"""Models made around given tensors: every tensor in its place, none made twice, none forgotten."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from polyformer.errors import SpecError, WeightsError
from polyformer.families import Transformer2017
from polyformer.families.transformer import Depth, NormChoice
from polyformer.parts import Linear
from polyformer.parts.model import TransformerPart
from polyformer.weights.assemble import assemble, disassemble

SMALL = Transformer2017(11, 11, width=8, depth=Depth(2, 1), ties="all")


def built(config: Transformer2017) -> TransformerPart:
    part = config.spec().build()
    assert isinstance(part, TransformerPart)
    return part.eval()


@pytest.mark.parametrize("ties", ["none", "output", "all"])
@pytest.mark.parametrize("kind", ["layer", "rms", "batch"])
def test_there_and_back(ties: str, kind: Any) -> None:
    config = SMALL.replace(ties=ties, norm=NormChoice(kind, "pre"))
    model = built(config)
    for buffer in model.buffers():
        buffer.uniform_(0.5, 1.5)
    tensors = disassemble(model)
    again = assemble(config.spec(), tensors)
    assert again.state_dict().keys() == model.state_dict().keys()
    assert all(again.state_dict()[name].equal(tensor) for name, tensor in model.state_dict().items())
    assert len(list(again.parameters())) == len(list(model.parameters()))
    ids = torch.tensor([[1, 2, 3]])
    assert isinstance(again, TransformerPart)
    out, wanted = (m.eval()(ids, None, ids).logits for m in (again, model))
    assert out is not None
    assert wanted is not None
    assert out.equal(wanted)


def test_tensors_are_taken_not_copied_and_randomness_is_left_alone() -> None:
    tensors = disassemble(built(SMALL))
    state = torch.get_rng_state()
    model = assemble(SMALL.spec(), tensors)
    assert torch.get_rng_state().equal(state)
    assert {p.data_ptr() for p in model.parameters()} == {t.data_ptr() for t in tensors.values()}
    assert all(p.requires_grad and p.is_leaf for p in model.parameters())


def test_tied_tensors_once_or_equal() -> None:
    tensors = disassemble(built(SMALL))
    assert "source.tokens.weight" in tensors
    assert "head.projection.weight" not in tensors
    under_another_name = dict(tensors)
    under_another_name["head.projection.weight"] = under_another_name.pop("source.tokens.weight")
    model = assemble(SMALL.spec(), under_another_name)
    state = model.state_dict()
    assert state["source.tokens.weight"].data_ptr() == state["head.projection.weight"].data_ptr()
    assemble(SMALL.spec(), tensors | {"head.projection.weight": tensors["source.tokens.weight"].clone()})
    with pytest.raises(
        WeightsError, match=r"'source.tokens.weight' and 'head.projection.weight' are tied, but they differ"
    ):
        assemble(SMALL.spec(), tensors | {"head.projection.weight": tensors["source.tokens.weight"] + 1})


def test_what_does_not_fit_is_named() -> None:
    tensors = disassemble(built(SMALL))
    name = "decoder.blocks.0.steps.1.op.k.weight"
    missing = {key: tensor for key, tensor in tensors.items() if key != name}
    with pytest.raises(WeightsError, match=rf"lack '{name}'$"):
        assemble(SMALL.spec(), missing)
    with pytest.raises(WeightsError, match=r"no place in this model for 'extra'"):
        assemble(SMALL.spec(), tensors | {"extra": torch.ones(1)})
    with pytest.raises(WeightsError, match=rf"'{name}' has shape \[4, 8\], but the model needs \[8, 8\]"):
        assemble(SMALL.spec(), tensors | {name: torch.ones(4, 8)})
    with pytest.raises(WeightsError, match=rf"'{name}' holds torch.int64, but the model needs torch.float32"):
        assemble(SMALL.spec(), tensors | {name: torch.ones(8, 8, dtype=torch.int64)})
    with pytest.raises(WeightsError, match=r"lack .* and \d+ more"):
        assemble(SMALL.spec(), {})


def test_a_buffer_is_not_forgotten() -> None:
    config = SMALL.replace(norm=NormChoice("batch", "pre"))
    tensors = disassemble(built(config))
    del tensors["encoder.norm.running_mean"]
    with pytest.raises(WeightsError, match=r"lack 'encoder.norm.running_mean'"):
        assemble(config.spec(), tensors)


def test_another_dtype_and_plain_parts() -> None:
    model = assemble(SMALL.spec(), disassemble(built(SMALL)), dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    weight = torch.tensor([[1, 2, 3], [4, 5, 6]], dtype=torch.float64)
    linear = assemble(Linear(3, 2, bias=False), {"weight": weight})
    assert linear(torch.ones(3, dtype=torch.float64)).tolist() == [6, 15]


@pytest.mark.parametrize("size", [2**40, 2**70])
def test_sizes_beyond_every_tensor(size: int) -> None:
    with pytest.raises(SpecError, match="the model can't be built: "):
        assemble(Linear(size, size), {})
