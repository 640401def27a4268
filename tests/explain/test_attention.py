"""Attention weights equal the softmax worked out by hand, cost nothing when not asked for, and can be drawn."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from polyformer.errors import DataError, RunError, SpecError
from polyformer.explain import Explained, Picture, attention_picture, draw_attention, explain_attention
from polyformer.explain.labels import find_lettering
from polyformer.generate import Limit, Search, translate
from polyformer.parts.kernels.softmax import SoftmaxPart
from polyformer.parts.model import TransformerPart
from tests.generate.models import Words, tiny

WORDS = "▁save ▁the ▁file 保存 文件 ▁übersetzen ▁$x^2$ \x07 a_very_long_token_that_nobody_wants_to_read"
TEXT = "▁save 保存 ▁$x^2$ ▁übersetzen \x07"
SETTINGS = Search(beams=2, limit=Limit(5))


def explained(model: TransformerPart) -> Explained:
    tokenizer = Words(WORDS)
    return explain_attention(model, tokenizer, tokenizer.encode_source(TEXT), [4, 7, 8])


def heads_of(x: Tensor) -> Tensor:
    """[S, D] -> [H, S, E], for the two heads of a tiny model."""
    return x.unflatten(1, (2, -1)).transpose(0, 1)


def test_weights_equal_the_softmax_by_hand() -> None:
    model = tiny(seed=1, layers=1)
    found = {one.kind: one.weights for one in explained(model).maps}
    source = torch.tensor([Words(WORDS).encode_source(TEXT)])
    read = torch.tensor([[1, 4, 7, 8]])
    inputs: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if name.endswith(".op"):
            module.register_forward_hook(lambda _, given, __, name=name: inputs.update({name: given[0][0].detach()}))
    with torch.no_grad():
        memory = model.encode(source).hidden[0]
        model.decode(read, memory=model.encode(source))
        for kind, name, causal in (
            ("encoder", "encoder.blocks.0.steps.0.op", False),
            ("decoder", "decoder.blocks.0.steps.0.op", True),
            ("cross", "decoder.blocks.0.steps.1.op", False),
        ):
            part: Any = model.get_submodule(name)
            x = inputs[name]
            q, k = heads_of(part.q(x)), heads_of(part.k(memory if kind == "cross" else x))
            scores = q @ k.mT / q.shape[-1] ** 0.5
            if causal:
                scores = scores.masked_fill(torch.ones(len(x), len(x)).triu(1).bool(), float("-inf"))
            assert torch.allclose(found[kind], scores.softmax(-1), atol=1e-5), kind


def test_every_layer_and_kind_is_there_with_its_labels() -> None:
    found = explained(tiny(layers=3))
    assert [(one.kind, one.layer) for one in found.maps] == [
        *(("encoder", layer) for layer in (1, 2, 3)),
        *((kind, layer) for layer in (1, 2, 3) for kind in ("decoder", "cross")),
    ]
    assert found.source[-1] == "<eos>"
    assert (found.read[0], found.written[-1]) == ("<bos>", "<eos>")
    assert found.read[1:] == found.written[:-1] == ["▁save", "保存", "文件"]
    for one in found.maps:
        rows = found.source if one.kind == "encoder" else found.written
        columns = found.read if one.kind == "decoder" else found.source
        assert one.weights.shape == (2, len(rows), len(columns))
        assert torch.allclose(one.weights.sum(-1), torch.ones(2, len(rows)), atol=1e-5)


def test_no_weights_are_computed_when_nothing_is_to_be_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> Tensor:
        raise AssertionError("weights were computed")

    monkeypatch.setattr(SoftmaxPart, "weights", refuse)
    model, tokenizer = tiny(), Words(WORDS)
    translate(model, tokenizer, [TEXT], SETTINGS)
    model(torch.tensor([[5, 6, 2]]), decoder_input_ids=torch.tensor([[1, 5]]))
    with pytest.raises(AssertionError, match="weights were computed"):
        explained(model)


def test_an_explanation_leaves_the_output_as_it_is() -> None:
    model = tiny(seed=2)
    with torch.no_grad():
        before = model(torch.tensor([[5, 6, 2]]), decoder_input_ids=torch.tensor([[1, 5]])).logits
        explained(model)
        after = model(torch.tensor([[5, 6, 2]]), decoder_input_ids=torch.tensor([[1, 5]])).logits
    assert before is not None
    assert after is not None
    assert torch.equal(before, after)


def size_of(png: bytes) -> tuple[int, int]:
    """Return the size of a PNG that can be read whole; raises if it can't."""
    image = pytest.importorskip("PIL.Image").open(io.BytesIO(png))
    image.load()
    assert image.format == "PNG"
    assert len(image.convert("L").getcolors()) > 20
    size: tuple[int, int] = image.size
    return size


def test_the_picture_is_a_png_of_the_best_translation(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    model, tokenizer = tiny(seed=1), Words(WORDS)
    best = attention_picture(model, tokenizer, TEXT, tmp_path / "all.png", settings=SETTINGS)
    assert best == translate(model, tokenizer, [TEXT], SETTINGS)[0][0]
    assert "matplotlib.pyplot" not in sys.modules
    whole = size_of((tmp_path / "all.png").read_bytes())
    part = Picture(kinds=("cross",), layers=(2,))
    attention_picture(model, tokenizer, TEXT, tmp_path / "part.png", part, SETTINGS)
    assert size_of((tmp_path / "part.png").read_bytes())[1] < whole[1] / 2


def test_a_long_text_gives_a_picture_that_can_be_opened() -> None:
    pytest.importorskip("matplotlib")
    tokenizer = Words(WORDS)
    long = tokenizer.encode_source(" ".join(["▁save"] * 160))
    found = explain_attention(tiny(layers=1), tokenizer, long, [5] * 160)
    assert max(size_of(draw_attention(found, Picture(kinds=("cross",))))) <= 10_000


def test_characters_without_a_font_are_named() -> None:
    pytest.importorskip("matplotlib")
    lettering = find_lettering(["save", "ü", "\U0010fffd", "\x07"])
    assert lettering.missing == set()  # what can't be seen is not looked for
    assert lettering.label("ü\x07\U0010fffd") == "ü‹7›‹10FFFD›"
    assert not lettering.caption()
    unknown = find_lettering(["\U0001fbff"]) if "\U0001fbff" in find_lettering(["\U0001fbff"]).missing else None
    if unknown is not None:
        assert unknown.label("a\U0001fbff") == "a‹1FBFF›"
        assert "no installed font" in unknown.caption()


def test_long_tokens_are_shortened() -> None:
    pytest.importorskip("matplotlib")
    shown = find_lettering(["a" * 100]).label("a" * 100)
    assert len(shown) < 30
    assert shown.endswith("…")


def test_what_can_not_be_drawn_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    model, tokenizer, file = tiny(), Words(WORDS), tmp_path / "x.png"
    with pytest.raises(SpecError, match="no layer 3 of cross attention; there are 1 to 2"):
        attention_picture(model, tokenizer, TEXT, file, Picture(("cross",), (3,)), SETTINGS)
    with pytest.raises(SpecError, match="kinds should name"):
        Picture(())
    with pytest.raises(DataError, match="the text is empty"):
        attention_picture(model, tokenizer, " ", file)
    with pytest.raises(RunError, match="can't be written"):
        attention_picture(model, tokenizer, TEXT, tmp_path / "none" / "x.png", settings=SETTINGS)
    assert not file.exists()


def test_without_matplotlib_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(RunError, match=r"polyformer\[plot\]"):
        draw_attention(explained(tiny()), Picture())


def test_a_model_without_a_decoder_is_refused() -> None:
    model = tiny()
    model.decoder = None
    with pytest.raises(SpecError, match="encoder and a decoder"):
        explained(model)
