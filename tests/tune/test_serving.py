"""Adapters by request: each text is written as its adapter alone would write it, whoever else is asked."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from polyformer.errors import SpecError
from polyformer.generate import Capacity, Engine, Request, Sampling, runner_of
from polyformer.native.builder import LoweringError
from polyformer.native.machine import Machine
from polyformer.native.runner import runner
from polyformer.parts.flow import Mix
from polyformer.parts.model import TransformerPart
from polyformer.swap.swap import Swap
from polyformer.tune import (
    DoraChange,
    Ia3Change,
    LoraChange,
    PrefixChange,
    PromptChange,
    SetShares,
    attach,
    detach,
    merge,
    prompt_ids,
    using,
)
from polyformer.tune.attach import rebuilt
from polyformer.tune.changes import adapters_of
from tests.generate.writers import ids, requests, writer
from tests.native.cases import compiled


def tuned(kind: str = "dense") -> TransformerPart:
    """Return a writer with an adapter of every kind, none of which acts unless it is asked for."""
    model = writer(kind)
    changes: list[Swap] = [
        LoraChange("low", rank=3),
        LoraChange("headed", targets=("v",), rank=2, whole=("head.projection",)),
        DoraChange("turned", rank=2),
        Ia3Change("scaled", outputs=("k", "v"), inputs=("down",)),
    ]
    if kind != "recurrent":
        changes.append(PrefixChange("ahead", tokens=3))
    changes.append(PromptChange("told", tokens=4))
    torch.manual_seed(3)
    for change in changes:
        model = attach(model, change)
    with torch.no_grad():
        for one in model.parameters():
            if one.requires_grad:
                one.add_(0.5 * torch.randn_like(one))
    return rebuilt(model, SetShares(())).eval()


def written(model: TransformerPart, request: Request, mix: Mix) -> list[int]:
    """Write the likeliest tokens with the whole text read anew for each."""
    names = list(mix)
    lead = [token for name in names for token in prompt_ids(model.spec, name)]  # type: ignore[arg-type]
    text = list(request.prompt)
    for _ in range(request.settings.limit):
        given: dict[str, Any] = {"input_ids": torch.tensor([[*lead, *text]])}
        if request.source is not None:
            given = {"input_ids": torch.tensor([[*lead, *request.source]]), "decoder_input_ids": torch.tensor([text])}
        with torch.no_grad(), using(model, mix):
            text.append(int(model(**given).logits[0, -1].argmax()))
        if text[-1] in request.ends:
            return text[len(request.prompt) : -1]
    return text[len(request.prompt) :]


@pytest.mark.parametrize("kind", ["dense", "encoder-decoder", "recurrent"])
def test_each_request_has_its_adapter(kind: str) -> None:
    model = tuned(kind)
    mixes: list[Mix] = [{}, *({name: 1.0} for name in adapters_of(model.spec)), {"low": 0.5, "turned": 0.7}]
    asked = [Request(one.prompt, Sampling(limit=8), one.ends, one.source) for one in requests(kind, len(mixes))]
    engine = Engine(runner_of(model, 5), Capacity(rows=7))
    named: list[Any] = [next(iter(mix)) if list(mix.values()) == [1.0] else mix for mix in mixes]
    handles = [
        engine.submit(Request(one.prompt, one.settings, one.ends, one.source, adapter=adapter))
        for one, adapter in zip(asked, named, strict=True)
    ]
    answers = [handle.result().ids for handle in handles]
    wanted = [written(model, one, mix) for one, mix in zip(asked, mixes, strict=True)]
    assert answers == wanted
    base = writer(kind)
    assert answers[0] == written(attach(base, LoraChange(rank=1)), asked[0], {})
    assert len({tuple(one) for one in wanted}) > 3
    assert engine.bytes == 0


def test_a_mix_is_one_of_the_cache_keys() -> None:
    model, prompt = tuned(), ids(40, 1)
    engine = Engine(runner_of(model, 4), Capacity(kept=4))

    def ask(adapter: str | Mix | None) -> int:
        return engine.submit(Request(prompt, Sampling(limit=2), adapter=adapter)).result().reused

    assert [ask("low"), ask("turned"), ask({"low": 0.5}), ask({})] == [0, 0, 0, 0]
    assert [ask("low"), ask({"turned": 1.0}), ask({"low": 0.5}), ask({})] == [39, 39, 39, 39]
    assert ask("told") == 0
    assert ask("told") == 39


def test_a_request_keeps_its_adapter_when_it_must_wait() -> None:
    model = tuned()
    asked = [Request(ids(9, i), Sampling(limit=30), adapter=name) for i, name in enumerate(("low", "told", "ahead"))]
    wanted = [Engine(runner_of(model, 1)).submit(one).result() for one in asked]
    slots = runner_of(model, 3)
    engine = Engine(slots, Capacity(memory=slots.bytes_for(39) * 2, rows=8))
    found = [handle.result() for handle in [engine.submit(one) for one in asked]]
    for one, other in zip(found, wanted, strict=True):
        assert one.ids == other.ids
        assert math.isclose(one.log_probability, other.log_probability, abs_tol=1e-8)


def test_unknown_adapters() -> None:
    engine = Engine(runner_of(tuned(), 1))
    with pytest.raises(SpecError, match=r"no adapter called 'turnt' \(did you mean 'turned'\?\)"):
        engine.submit(Request([5], adapter="turnt"))
    with pytest.raises(SpecError, match=r"no adapter called 'low' \(here no request can name one"):
        Engine(runner_of(writer(), 1)).submit(Request([5], adapter="low"))


@compiled
def test_natively() -> None:
    """LoRA runs natively as it is; what else stands beside a matrix runs when it is merged."""
    model, prompt = detach(tuned().float(), "ahead", "told"), Request(ids(9, 1), Sampling(limit=8))
    for name in ("low", "turned", "headed"):
        set_so = rebuilt(model, SetShares.of({name: 1.0}))
        wanted = Engine(runner_of(set_so, 1)).submit(prompt).result()
        if name != "low":
            with pytest.raises(LoweringError, match="merge it into its matrix first"):
                runner(set_so, "fp32", Machine(1, 64, 1))
        native = Engine(runner(set_so if name == "low" else merge(set_so).model, "fp32", Machine(1, 64, 1)))
        assert native.submit(prompt).result().ids == wanted.ids
        with pytest.raises(SpecError, match="here no request can name one"):
            native.submit(Request([5], adapter="low"))
    quantised = Engine(runner(rebuilt(model, SetShares.of({"low": 1.0})), "q8", Machine(1, 64, 1)))
    assert len(quantised.submit(prompt).result().ids) == 8
