"""Attention swapped by name in models that there are: kernels whose sizes are filled in, windows, retention."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from polyformer.cli import app
from polyformer.errors import SpecError
from polyformer.families.language_model import LanguageModel
from polyformer.families.transformer import Depth, Transformer2017
from polyformer.loaded import Loaded, load, save
from polyformer.parts import Attention, CrossAttention, Performer, Retention
from polyformer.parts.model import TransformerPart
from polyformer.spec import walk
from polyformer.swap import Conversion, transplant

GPT = LanguageModel(40, 12, "forwards", 16, 2, 2)
BERT = LanguageModel(40, 12, "both ways", 16, 2, 2, positions="learned")


def built(config: LanguageModel | Transformer2017) -> TransformerPart:
    model = config.spec().build()
    assert isinstance(model, TransformerPart)
    return model.eval()


def swapped(model: TransformerPart, **asked: object) -> TransformerPart:
    return transplant(model, Conversion.from_data(asked))[0]


@pytest.mark.parametrize("kernel", ["performer", "linear", {"type": "Performer", "features": 64}], ids=str)
def test_a_kernel_takes_the_width_of_the_heads(kernel: object) -> None:
    model = swapped(built(GPT), kernel=kernel)
    kernels = {one.kernel for _, one in walk(model.spec) if isinstance(one, Attention)}
    assert len(kernels) == 1
    assert all(not isinstance(one, Performer) or one.width == 8 for one in kernels)
    assert model(input_ids=torch.randint(40, (1, 7))).logits.shape == (1, 7, 40)


def test_linformer_takes_the_length_of_the_positions() -> None:
    model = swapped(built(BERT), kernel="linformer")
    assert {one.kernel.length for _, one in walk(model.spec) if isinstance(one, Attention)} == {12}
    with pytest.raises(SpecError, match="can't honour the rule Causal"):
        swapped(built(GPT), kernel={"type": "Linformer", "length": 12})


def test_cross_attention_too() -> None:
    model = swapped(built(Transformer2017(20, 20, 16, Depth(1, 1))), kernel="performer")
    kernels = [one.kernel for _, one in walk(model.spec) if isinstance(one, Attention | CrossAttention)]
    assert kernels == [Performer(2)] * 3


def test_many_features_come_near_to_softmax() -> None:
    torch.manual_seed(0)
    model, ids = built(GPT), torch.randint(40, (2, 12))
    wanted = model(input_ids=ids).logits
    drift = [
        float(
            (swapped(model, kernel={"type": "Performer", "features": count})(input_ids=ids).logits - wanted)
            .detach()
            .norm()
        )
        for count in (8, 4096)
    ]
    assert drift[1] < drift[0] / 2


def test_retention_keeps_the_matrices() -> None:
    model = built(GPT)
    made, report = transplant(model, Conversion.from_data({"kernel": "retention"}))
    retentions = [one for _, one in walk(made.spec) if isinstance(one, Retention)]
    assert len(retentions) == 2
    old, new = model.state_dict(), made.state_dict()
    place = "decoder.blocks.1.steps.0.op"
    for name in ("q.weight", "v.bias", "o.weight"):
        assert torch.equal(old[f"{place}.{name}"], new[f"{place}.{name}"])
    assert {one.names[0].split(".op.")[1] for one in report.tensors if one.fate == "new"} == {"gate.weight"}
    assert not report.left_out
    assert made(input_ids=torch.randint(40, (1, 7))).logits.isfinite().all()


def test_what_can_not_be() -> None:
    for asked, sentence in (
        ({"kernel": "retention"}, "reads both ways"),
        ({"kernel": "window"}, "set window to its width"),
        ({"kernel": "performr"}, "did you mean 'performer'"),
        ({"kernel": {"type": "Performer", "width": 5}}, "can't be those of heads 8 wide"),
    ):
        with pytest.raises(SpecError, match=sentence):
            swapped(built(BERT), **asked)  # type: ignore[arg-type]
    grouped = swapped(built(GPT), groups=1)
    with pytest.raises(SpecError, match="set groups=2 too"):
        swapped(grouped, kernel="retention")
    assert swapped(grouped, groups=2, kernel="retention") is not None


def test_from_the_command_line(tmp_path: Path) -> None:
    save(Loaded(built(GPT)), tmp_path / "gpt")
    for i, setting in enumerate(("kernel={type='Performer', features=32}", "window=4", "kernel=retention")):
        out = tmp_path / str(i)
        done = CliRunner().invoke(app, ["convert", str(tmp_path / "gpt"), "--set", setting, "--out", str(out)])
        assert done.exit_code == 0, done.output
        assert load(out).model(input_ids=torch.randint(40, (1, 9))).logits is not None
