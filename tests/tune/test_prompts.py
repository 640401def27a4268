"""Prefixes and prompts: what a tuned model has read before every text."""

from __future__ import annotations

import pytest
import torch

from polyformer.errors import SpecError
from polyformer.parts import AfterPrefix, Window, contract_of
from polyformer.parts.flow import GrowingCache
from polyformer.parts.model import TransformerPart
from polyformer.spec import walk
from polyformer.swap import LimitWindow, transplant
from polyformer.tune import (
    LoraChange,
    PrefixChange,
    PromptChange,
    adapter_of,
    attach,
    detach,
    merge,
    prompt_ids,
    using,
)
from tests.generate.models import tiny_spec
from tests.parts.models import build
from tests.swap.models import gpt, t5
from tests.tune.test_adapters import IDS, logits, moved


def test_a_prefix_is_a_cache_that_was_filled_before() -> None:
    """Keys and values of real tokens as a prefix give what the tokens themselves give, positions and windows too."""
    for window in (0, 4):
        base, _ = transplant(build(gpt(2)).double(), LimitWindow(window))
        cache = GrowingCache()
        with torch.no_grad():
            base(input_ids=IDS[:1, :3], cache=cache)
            wanted = base(input_ids=IDS[:1], cache=cache).logits
            made = attach(base, PrefixChange(tokens=3))
            for slot, (keys, values) in cache._own.items():
                part = made.get_submodule(f"decoder.blocks.{slot.split('.')[1]}.steps.0.op.adapters.0")
                part.keys.copy_(keys[0, :, :3].transpose(0, 1).flatten(1))
                part.values.copy_(values[0, :, :3].transpose(0, 1).flatten(1))
            assert torch.allclose(made(input_ids=IDS[:1]).logits, wanted, atol=1e-12)
        assert window == 0 or any(isinstance(one, Window) for _, one in walk(made.spec))


def test_a_prefix_made_by_a_network() -> None:
    base = build(gpt(3)).double()
    made = moved(attach(base, PrefixChange(tokens=4, hidden=6)))
    first, second = (made.get_submodule(f"decoder.blocks.{i}.steps.0.op.adapters.0") for i in (0, 2))
    assert first.rows is second.rows
    assert first.first.weight is second.first.weight
    assert first.last.weight is not second.last.weight
    keys, values = first.pair()
    hidden = torch.tanh(first.rows @ first.first.weight.T + first.first.bias)
    assert torch.allclose(torch.cat((keys, values), 1), hidden @ first.last.weight.T + first.last.bias)
    again = attach(base, adapter_of(made))
    assert torch.equal(logits(again), logits(made))
    assert again.spec == made.spec


@pytest.mark.parametrize("spec", [gpt(2), t5(2), tiny_spec(23)], ids=["decoder", "encoder", "both"])
def test_on_and_off(spec: object) -> None:
    base = build(spec).double()  # type: ignore[arg-type]
    made = moved(attach(base, PrefixChange(tokens=3)))

    def answer(model: TransformerPart) -> torch.Tensor:
        given = {"input_ids": IDS} | ({"decoder_input_ids": IDS} if model.encoder and model.decoder else {})
        with torch.no_grad():
            return model(**given).hidden

    assert (answer(made) - answer(base)).abs().max() > 1e-3
    with using(made, {}):
        assert torch.equal(answer(made), answer(base))
    assert detach(made).spec == base.spec
    assert torch.equal(answer(detach(made)), answer(base))


def test_with_lora_beneath_and_above() -> None:
    base = build(gpt(2)).double()
    torch.manual_seed(1)
    one = moved(attach(attach(base, PrefixChange("ahead", tokens=3)), LoraChange("low", rank=2)))
    other = attach(attach(base, adapter_of(one, "low")), adapter_of(one, "ahead"))
    assert torch.allclose(logits(one), logits(other), atol=1e-12)
    assert {placed.path for placed in adapter_of(one, "low").parts.placed} == {
        placed.path
        for placed in LoraChange().placed(base.spec).placed  # type: ignore[arg-type]
    }
    with pytest.raises(SpecError, match="what stands beside Attention can't be merged"):
        merge(one)
    assert any(isinstance(record, AfterPrefix) for _, record in walk(one.spec))
    assert not any(isinstance(record, AfterPrefix) for _, record in walk(detach(one, "ahead").spec))


def test_a_prompt_is_tokens_of_its_own() -> None:
    base = build(gpt(2)).double()
    two = moved(attach(attach(base, PromptChange("one", tokens=3)), PromptChange("two", tokens=2)))
    assert prompt_ids(two.spec, "one") == (23, 24, 25)  # type: ignore[arg-type]
    assert prompt_ids(two.spec, "two") == (26, 27)  # type: ignore[arg-type]
    assert torch.equal(logits(two), logits(base))
    lead = torch.tensor([23, 24, 25]).expand(2, -1)
    with torch.no_grad():
        led = two(input_ids=torch.cat((lead, IDS), 1)).logits
        rows = two.target.tokens.adapters[0].weight
        made = two.target.tokens(torch.cat((lead, IDS), 1), None)
    assert torch.equal(made[0, :3], rows)
    assert (led[:, 3:] - logits(base)).abs().max() > 1e-3


def test_what_can_not_be() -> None:
    with pytest.raises(SpecError, match="a prefix of 0 tokens is none"):
        PrefixChange(tokens=0)
    with pytest.raises(SpecError, match="leaves no places for a text"):
        PrefixChange(tokens=32).apply(gpt(2))
    with pytest.raises(SpecError, match="no encoder that reads tokens"):
        PrefixChange(side="encoder").apply(gpt(2))
    made = moved(attach(build(gpt(2)), PrefixChange()))
    assert contract_of(made.spec)["packed"].part == "Prefix"
    with pytest.raises(SpecError, match="Prefix can't be packed: each document would need the prefix before it"):
        made(input_ids=IDS, document_ids=torch.zeros_like(IDS))
    with pytest.raises(SpecError, match=r"can't have a share of 0.5"), using(made, {"default": 0.5}):
        made(input_ids=IDS)
