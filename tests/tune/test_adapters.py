"""Adapters as rewrites: what they compute, where they stand, merged and apart, several on one base."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor

from polyformer.errors import SpecError
from polyformer.parts import IA3, Adapted, DoRA, Dropout, Linear, LoRA, Whole
from polyformer.parts.adapters import AdaptedPart
from polyformer.parts.model import TransformerPart
from polyformer.spec import walk
from polyformer.swap import transplant
from polyformer.swap.swap import Swap
from polyformer.tune import (
    DoraChange,
    Ia3Change,
    LoraChange,
    RankFor,
    SetShares,
    adapter_of,
    adapters_of,
    attach,
    detach,
    freeze,
    merge,
    train_adapters,
    unmerge,
    using,
)
from tests.parts.models import build
from tests.swap.models import gpt, t5

IDS = torch.arange(14).view(2, 7)
CHANGES: dict[str, Swap] = {
    "lora": LoraChange(rank=3, alpha=6.0, whole=("head.projection",)),
    "root": LoraChange(rank=4, targets=("q", "up", "head.projection"), scaling="root"),
    "dora": DoraChange(rank=3),
    "ia3": Ia3Change(),
}
every = pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)


def trained(change: Swap, spec: object = None) -> tuple[TransformerPart, TransformerPart]:
    """Return a model in double precision, and the same with an adapter whose numbers all matter."""
    base = build(gpt(2) if spec is None else spec).double()
    torch.manual_seed(1)
    return base, moved(attach(base, change))


def moved(model: TransformerPart) -> TransformerPart:
    """Change all numbers that may be trained."""
    with torch.no_grad():
        for one in model.parameters():
            if one.requires_grad:
                one.add_(0.3 * torch.randn_like(one))
    return model


def logits(model: TransformerPart) -> Tensor:
    """Return the answers to some ids."""
    with torch.no_grad():
        answer = model(input_ids=IDS)
    return answer.hidden if answer.logits is None else answer.logits


def linear(adapter: object) -> tuple[AdaptedPart, Tensor]:
    """Return a matrix with an adapter far from its start, and rows."""
    torch.manual_seed(0)
    part = Adapted(Linear(6, 4), (adapter,)).build(dtype=torch.float64).eval()  # type: ignore[arg-type]
    assert isinstance(part, AdaptedPart)
    with torch.no_grad():
        for one in part.parameters():
            one.add_(torch.randn_like(one))
    return part, torch.randn(2, 5, 6, dtype=torch.float64)


@pytest.mark.parametrize("share", [1.0, 0.5])
def test_formulas(share: float) -> None:
    """Each adapter is what its paper writes, made with whole matrices."""
    part, x = linear(LoRA("one", share, 6, 4, 3, 2.0, "root"))
    base, own = part.base, part.adapters[0]
    change = 2.0 / 3**0.5 * own.b @ own.a
    assert torch.allclose(part(x), x @ (base.weight + share * change).T + base.bias)

    part, x = linear(DoRA("one", share, 6, 4, 3, 2.0))
    base, own = part.base, part.adapters[0]
    turned = base.weight + 2.0 / 3 * own.b @ own.a
    lengths = base.weight.norm(dim=1) + own.longer
    whole = lengths[:, None] * turned / turned.norm(dim=1, keepdim=True)
    assert torch.allclose(part(x), x @ torch.lerp(base.weight, whole, share).T + base.bias)

    part, x = linear(IA3("one", share, 4))
    factors = 1 + share * (part.adapters[0].factors - 1)
    assert torch.allclose(part(x), part.base(x) * factors)
    part, x = linear(IA3("one", share, 6, "inputs"))
    factors = 1 + share * (part.adapters[0].factors - 1)
    assert torch.allclose(part(x), part.base(x * factors))

    part, x = linear(Whole("one", share, Linear(6, 4)))
    assert torch.allclose(part(x), torch.lerp(part.base(x), part.adapters[0].part(x), share))


def test_dora_sends_no_gradient_through_its_norm() -> None:
    part, x = linear(DoRA("one", 1.0, 6, 4, 3, 2.0, dropout=Dropout(0.0)))
    base, own = part.base, part.adapters[0]
    turned = base.weight + 2.0 / 3 * own.b @ own.a
    lengths = base.weight.detach().norm(dim=1) + own.longer
    wanted = x @ (lengths / turned.norm(dim=1).detach())[:, None].mul(turned).T + base.bias
    for answer in (part(x), part.train()(x)):
        parameters = [own.a, own.b, own.longer]
        ours = torch.autograd.grad(answer.square().sum(), parameters, retain_graph=True)
        theirs = torch.autograd.grad(wanted.square().sum(), parameters, retain_graph=True)
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one, other)


@every
def test_a_new_adapter_changes_nothing(change: Swap) -> None:
    base = build(gpt(2)).double()
    made = attach(base, change)
    assert torch.allclose(logits(made), logits(base), atol=1e-12)
    other, report = transplant(base, change)
    assert torch.allclose(logits(other), logits(base), atol=1e-12)
    assert "left out" not in report.summary
    assert isinstance(made.spec, type(base.spec))
    assert type(made.spec).from_json(made.spec.to_json()) == made.spec


@every
def test_the_base_is_shared_and_frozen(change: Swap) -> None:
    base, made = trained(change)
    shared = {one.data_ptr() for one in base.parameters()}
    learns = {name for name, one in made.named_parameters() if one.requires_grad}
    assert learns == {name for name, _ in made.named_parameters() if ".adapters." in name}
    assert all((one.data_ptr() in shared) != one.requires_grad for one in made.parameters())
    loss = made(input_ids=IDS).logits.square().sum()
    loss.backward()
    assert all((one.grad is not None) == one.requires_grad for one in made.parameters())


@every
def test_merged_and_apart_again(change: Swap) -> None:
    base, made = trained(change)
    merged = merge(made)
    assert not adapters_of(merged.model.spec)
    assert (logits(made) - logits(base)).abs().max() > 1e-3
    assert torch.allclose(logits(merged.model), logits(made), atol=1e-10)
    assert merged.drift is not None
    assert merged.drift.largest < 1e-10
    apart = detach(made)
    assert apart.spec == base.spec
    assert torch.equal(logits(apart), logits(base))
    if change in (CHANGES["dora"], CHANGES["lora"]):
        with pytest.raises(SpecError, match="can't be taken out of a matrix again; load the base"):
            unmerge(merged.model, adapter_of(made))
        return
    again = unmerge(merged.model, adapter_of(made))
    assert torch.allclose(logits(again), logits(made), atol=1e-9)
    assert torch.allclose(logits(detach(again)), logits(base), atol=1e-9)


def test_merging_rounds_to_the_base_precision() -> None:
    base = build(gpt(2)).bfloat16()
    made = moved(attach(base, LoraChange(rank=2)))
    assert {one.dtype for one in made.parameters() if one.requires_grad} == {torch.float32}
    merged = merge(made)
    assert {one.dtype for one in merged.model.parameters()} == {torch.bfloat16}
    assert merged.drift is not None
    assert merged.drift.largest > 0
    assert merged.drift.same is not None
    assert merged.drift.same > 0.9
    path = "decoder.blocks.0.steps.0.op.q"
    part, exact = made.get_submodule(path), merged.model.get_submodule(path).weight
    assert isinstance(part, AdaptedPart)
    own = part.adapters[0]
    assert torch.equal(exact, (part.base.weight.float() + own.scale * own.b @ own.a).bfloat16())


def test_a_merged_head_is_no_longer_the_embedding() -> None:
    """The embedding must not change with the matrix that it was tied to."""
    base, made = trained(LoraChange(targets=("head.projection",), rank=2))
    merged = merge(made).model
    assert not merged.spec.ties
    assert torch.equal(merged.target.tokens.weight, base.target.tokens.weight)
    assert torch.allclose(logits(merged), logits(made), atol=1e-10)


def test_several_on_one_base() -> None:
    base, one = trained(LoraChange("one", rank=2))
    torch.manual_seed(2)
    both = moved(attach(one, DoraChange("two", targets=("q", "v"), rank=3)))
    alone = logits(attach(base, adapter_of(both, "two")))
    assert adapters_of(both.spec) == ["one", "two"]
    with using(both, {}):
        assert torch.equal(logits(both), logits(base))
    with using(both, "two"):
        assert torch.allclose(logits(both), alone, atol=1e-12)
        with using(both, "one"):
            one_alone = logits(both)
        assert torch.allclose(logits(both), alone, atol=1e-12)
    mix = {"one": 0.3, "two": 0.7}
    with using(both, mix):
        mixed = logits(both)
    assert torch.allclose(logits(merge(both, mix).model), mixed, atol=1e-10)
    assert merge(both, mix).drift.largest < 1e-10  # type: ignore[union-attr]
    set_so, _ = transplant(both, SetShares.of(mix))
    assert torch.allclose(logits(set_so), mixed, atol=1e-12)
    assert torch.allclose(logits(detach(both, "two")), one_alone, atol=1e-12)
    assert adapters_of(detach(both, "one").spec) == ["two"]
    train_adapters(both, "two")
    assert all((".adapters.1." in name) or not one.requires_grad for name, one in both.named_parameters())


def test_targets() -> None:
    spec = gpt(2)
    inner = [path for path, one in walk(spec) if isinstance(one, Linear) and not path.startswith("head")]
    assert [one.path for one in LoraChange().placed(spec).placed] == inner
    chosen = LoraChange(targets=("op.q", "blocks.1.*.up"), rank=2, ranks=(RankFor("blocks.1.*", 5, 3.0),)).placed(spec)
    assert [(one.path, one.adapter.rank, one.adapter.alpha) for one in chosen.placed] == [  # type: ignore[attr-defined]
        ("decoder.blocks.0.steps.0.op.q", 2, 16.0),
        ("decoder.blocks.1.steps.0.op.q", 5, 3.0),
        ("decoder.blocks.1.steps.1.op.up", 5, 3.0),
    ]
    assert len(LoraChange().placed(t5()).placed) == 3 * 7


def test_frozen_by_pattern() -> None:
    model = freeze(build(gpt(3)), "decoder.blocks.0", "target", "up.weight")
    frozen = {name for name, one in model.named_parameters() if not one.requires_grad}
    wanted = ("target.", "decoder.blocks.0.")
    assert frozen == {name for name, _ in model.named_parameters() if name.startswith(wanted) or "up.weight" in name}
    with pytest.raises(SpecError, match=r"'blocks.7' matches no parameter of this model \(did you mean"):
        freeze(model, "blocks.7")


BAD: dict[str, tuple[Swap, str]] = {
    "no match": (LoraChange(targets=("op.qq",)), "'op.qq' matches no matrix of this model (did you mean 'op.q'"),
    "far": (LoraChange(targets=("xyz",)), "'xyz' matches no matrix of this model (its matrices are called down, k, o"),
    "none": (LoraChange(targets=()), "no targets are named; 'all linear' means every matrix"),
    "too large": (LoraChange(rank=17), "blocks.0.steps.0.op.q: a rank of 17 is too much: its matrix [16, 16]"),
    "ranks": (
        LoraChange(targets=("q",), ranks=(RankFor("v", 2),)),
        "'v', which is given a rank of its own, is no",
    ),
    "both": (Ia3Change(outputs=("down",)), "can have factors for its inputs or its outputs, not for both"),
    "twice": (LoraChange(whole=("op.q",)), "can't be trained whole and have an adapter besides"),
}


@pytest.mark.parametrize(("change", "told"), BAD.values(), ids=BAD)
def test_what_can_not_be(change: Swap, told: str) -> None:
    with pytest.raises(SpecError, match=re.escape(told)):
        change.apply(gpt(2))


def test_what_can_not_be_otherwise() -> None:
    base, made = trained(LoraChange())
    with pytest.raises(SpecError, match="a rank of 0 changes nothing"):
        LoraChange(rank=0)
    with pytest.raises(SpecError, match="two adapters beside one part are called 'default'"):
        attach(made, LoraChange())
    with pytest.raises(SpecError, match=r"no adapter called 'defualt' \(did you mean 'default'\?\)"):
        adapter_of(made, "defualt")
    with pytest.raises(SpecError, match=r"no adapter called 'one' \(it has none\)"), using(base, "one"):
        pass
    with pytest.raises(SpecError, match="no adapter that could be merged"):
        merge(base)
    wider = gpt(2).replace(ties=())
    deeper = attach(build(gpt(3)), LoraChange())
    with pytest.raises(SpecError, match=r"stands beside 'decoder.blocks.2.steps.0.op.q', which this model lacks"):
        attach(build(wider), adapter_of(deeper))
