"""Fused products: the same answers, tensors joined, caches and gradients as before."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from polyformer.errors import SpecError
from polyformer.parts import Attention, FeedForward, Heads, Linear, Tie, Transformer
from polyformer.spec import rewrite, walk
from polyformer.swap import Conversion, FuseProjections, GroupHeads, KeepBlocks, Swap, Swaps, drift, transplant
from tests.parts.models import Shape, decoder, translator
from tests.swap.models import gpt, ids, made, olmo, t5

GATED = gpt(2)
GATED = rewrite(GATED, lambda _, r: FeedForward.gated(16, 20) if isinstance(r, FeedForward) else r)  # type: ignore[assignment]


@pytest.mark.parametrize(
    "spec", [gpt(), olmo(), GATED, GroupHeads(2).apply(gpt())], ids=["gpt", "olmo", "gated", "groups"]
)
def test_answers_stay_and_tensors_are_joined(spec: Transformer) -> None:
    model = made(spec)
    new, report = transplant(model, FuseProjections())
    assert drift(model, new, [ids()]).largest < 1e-12
    assert not report.left_out
    assert {entry.fate for entry in report.tensors} <= {"kept", "mapped", "joined"}
    entry = next(entry for entry in report.tensors if entry.fate == "joined")
    assert entry.source == "decoder.blocks.0.steps.0.op.q.weight" or ".q.steps.0" in str(entry.source)
    assert sum(p.numel() for p in new.parameters()) == sum(p.numel() for p in model.parameters())
    assert Transformer.from_json(new.spec.to_json()) == new.spec


def test_all_sides_of_a_translator_and_one_without_a_head() -> None:
    model = made(translator(Shape()))
    new, report = transplant(model, FuseProjections())
    assert not report.left_out
    given = {"input_ids": ids() % 7, "decoder_input_ids": ids() % 7}
    torch.testing.assert_close(new(**given).logits, model(**given).logits, rtol=0, atol=1e-12)
    encoder = made(t5())
    other, _ = transplant(encoder, FuseProjections())
    torch.testing.assert_close(other(ids()).hidden, encoder(ids()).hidden, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "swap",
    [
        Swaps((KeepBlocks(decoder=2), FuseProjections())),
        Swaps((FuseProjections(), KeepBlocks(decoder=2))),
        Conversion(depth=KeepBlocks(decoder=2), fuse="projections"),
    ],
)
def test_with_other_changes(swap: Swap) -> None:
    model = made(gpt())
    alone, _ = transplant(model, KeepBlocks(decoder=2))
    new, report = transplant(model, swap)
    assert drift(alone, new, [ids()]).largest < 1e-12
    assert "new" not in {entry.fate for entry in report.tensors}


def test_gradients_are_the_joined_ones() -> None:
    model = made(GATED).train(False)
    new, _ = transplant(model, FuseProjections())
    for one in (model, new):
        one(ids()).logits.square().mean().backward()
    path = "decoder.blocks.1.steps.{}.op.{}.weight"
    for step, whole, names in ((0, "qkv", "qkv"), (1, "gate_up", ("gate", "up"))):
        joined = torch.cat([_gradient(model, path.format(step, name)) for name in names])
        torch.testing.assert_close(_gradient(new, path.format(step, whole)), joined, rtol=0, atol=1e-14)


def _gradient(model: Any, name: str) -> torch.Tensor:
    gradient = model.get_parameter(name).grad
    assert gradient is not None
    return gradient


def test_tied_and_unlike_matrices_are_left_apart() -> None:
    tied = gpt(2).replace(ties=(Tie("decoder.blocks.1.steps.0.op.q.weight", "decoder.blocks.0.steps.0.op.q.weight"),))
    with pytest.raises(SpecError, match="nothing can be fused here"):
        FuseProjections().apply(tied)
    unlike = rewrite(gpt(2), lambda _, r: r.replace(k=Linear(16, 16, False)) if isinstance(r, Attention) else r)
    with pytest.raises(SpecError, match="nothing can be fused here"):
        FuseProjections().apply(unlike)  # type: ignore[arg-type]


def test_twice_is_once_and_sizes_are_checked() -> None:
    once = FuseProjections().apply(gpt(2))
    assert FuseProjections().apply(once) == once
    fused = next(record for _, record in walk(once) if isinstance(record, Attention))
    with pytest.raises(SpecError, match="qkv gives 47 values, but queries, keys and values make 48"):
        fused.replace(qkv=Linear(16, 47))
    with pytest.raises(SpecError, match="fused; heads can be grouped before that only"):
        GroupHeads(2).apply(once)
    with pytest.raises(SpecError, match="name a gate"):
        FeedForward.of_widths(4, 8).replace(gate_up=Linear(4, 16))
    assert Heads(4, 2, 3).shares == [12, 6, 6]


def test_it_writes_from_a_cache_too() -> None:
    model = made(decoder(Shape("sinusoidal", "pre", 6, 3)))
    new, _ = transplant(model, FuseProjections())
    assert drift(model, new, [ids() % 7]).largest < 1e-12
