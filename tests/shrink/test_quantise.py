"""Models whose matrices are put into four bits: what becomes of each tensor, how far answers drift, and back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from polyformer.errors import SpecError
from polyformer.loaded import Loaded, load, save
from polyformer.parts import Linear, LinearAttention, Transformer
from polyformer.parts.model import TransformerPart
from polyformer.shrink import Dequantise, Linear4, Quantise
from polyformer.spec import walk
from polyformer.swap import SwapKernel, Swaps, drift, transplant
from polyformer.tune import LoraChange, attach, train_adapters
from polyformer.weights.assemble import disassemble
from tests.parts.models import SHAPES, build, translator
from tests.swap.models import gpt, ids, moved, t5

OP = "decoder.blocks.0.steps.0.op"


def forms(spec: Transformer) -> dict[str, type]:
    return {path: type(record) for path, record in walk(spec) if isinstance(record, Linear | Linear4)}


@pytest.fixture(scope="module")
def model() -> TransformerPart:
    return build(gpt(layers=2))


def test_all_but_embeddings_and_head(model: TransformerPart) -> None:
    quantised, report = moved(model, Quantise())
    found = forms(quantised.spec)
    assert {path for path, form in found.items() if form is Linear} == {"head.projection"}
    assert not report.left_out
    told = {entry.names[0]: entry for entry in report.tensors}
    assert told[f"{OP}.q.codes"].fate == "mapped"
    assert told[f"{OP}.q.codes"].source == f"{OP}.q.weight"
    assert told[f"{OP}.q.bias"].fate == "kept"
    apart = drift(model, quantised, [ids()])
    assert apart.largest > 0
    assert apart.divergence is not None
    assert apart.divergence < 0.2  # 16 wide and random: with SmolLM2's weights it is 0.02


def test_the_matrix_is_what_the_spec_makes_of_the_old_one(model: TransformerPart) -> None:
    quantised, _ = transplant(model, Quantise(form="fp4", scales="float32"))
    old, new = model.get_submodule(f"{OP}.q"), quantised.get_submodule(f"{OP}.q")
    spec = new.spec
    assert isinstance(spec, Linear4)
    assert (spec.form, spec.scales) == ("fp4", "float32")
    assert torch.equal(new.matrix(), spec.matrix(spec.held(old.weight)))


def test_back_and_forth(model: TransformerPart) -> None:
    change = Quantise(scales="float32")  # nested ones are rounded anew each time
    there, _ = transplant(model, change)
    back, report = transplant(there, Dequantise())
    assert back.spec == model.spec
    assert drift(there, back, [ids()]).largest < 1e-5
    assert not report.left_out
    assert report.summary["mapped"][0] == 2 * 6
    again, before = (disassemble(one) for one in (transplant(back, change)[0], there))
    assert all(torch.equal(tensor, before[name]) for name, tensor in again.items())


def test_into_another_form_of_four_bits(model: TransformerPart) -> None:
    there, _ = transplant(model, Quantise(scales="float32"))
    changed = Quantise(scales="float32").apply(model.spec)
    other = Dequantise().apply(changed)
    assert other == model.spec
    nested, report = transplant(there, Quantise().apply(model.spec))
    assert not report.left_out
    assert drift(there, nested, [ids()]).largest < 0.1


def test_some_by_their_names(model: TransformerPart) -> None:
    found = forms(Quantise(targets=("q", "decoder.blocks.1.*"), spared=("up",)).apply(model.spec))
    four = {path for path, form in found.items() if form is Linear4}
    assert f"{OP}.q" in four
    assert f"{OP}.k" not in four
    assert "decoder.blocks.1.steps.1.op.down" in four
    assert "decoder.blocks.1.steps.1.op.up" not in four


def test_with_the_head_a_tie_is_loosened(model: TransformerPart) -> None:
    quantised, _ = transplant(model, Quantise(targets=("head.projection",)))
    assert isinstance(quantised.spec, Transformer)
    assert not quantised.spec.ties
    assert forms(quantised.spec)["head.projection"] is Linear4


def test_together_with_other_changes(model: TransformerPart) -> None:
    both, _ = transplant(model, Swaps((Quantise(), SwapKernel(LinearAttention()))))
    records = dict(walk(both.spec))
    assert isinstance(records[f"{OP}.q"], Linear4)
    assert isinstance(records[f"{OP}.kernel"], LinearAttention)
    both(input_ids=ids())


def test_beside_adapters(model: TransformerPart) -> None:
    """LoRA over matrices in four bits, whichever came first; what is trained is the adapters alone."""
    adapters = LoraChange(rank=2, targets=("q", "v"))
    over = attach(transplant(model, Quantise())[0], adapters)
    under, report = transplant(attach(model, adapters), Quantise())
    assert over.spec == under.spec
    assert not report.left_out
    train_adapters(under)
    for tuned in (over, under):
        tuned(input_ids=ids()).logits.square().sum().backward()
        learnt = {name.rpartition(".")[2] for name, one in tuned.named_parameters() if one.grad is not None}
        assert learnt == {"a", "b"}
    assert drift(over, transplant(model, Quantise())[0], [ids()]).largest < 1e-5  # B is 0 at first


def test_encoders_and_translators() -> None:
    for spec, start in ((t5(), {}), (translator(SHAPES["2017"]), {"decoder_input_ids": ids() % 7})):
        whole = build(spec)
        quantised, report = transplant(whole, Quantise())
        assert not report.left_out
        assert drift(whole, quantised, [{"input_ids": ids() % 7, **start}]).rows


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (Quantise(targets=("qkv",)), "'qkv' matches no matrix of this model"),
        (Quantise(spared=("gate",)), "'gate' matches no matrix"),
        (Quantise(targets=("q",), spared=("q",)), "none of these matrices could be quantised"),
    ],
)
def test_what_fits_nothing(model: TransformerPart, change: Quantise, told: str) -> None:
    with pytest.raises(SpecError, match=told):
        change.apply(model.spec)


def test_a_folder_holds_it(model: TransformerPart, tmp_path: Path) -> None:
    quantised, _ = transplant(model, Quantise())
    save(Loaded(quantised.eval()), tmp_path / "small")
    again = load(tmp_path / "small")
    assert again.spec == quantised.spec
    given = ids()
    assert torch.equal(again.model(input_ids=given).logits, quantised(input_ids=given).logits)
