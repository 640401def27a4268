"""Fusion-in-Decoder against T5: on one passage bit for bit, on several through the reference's encoder and decoder."""

from __future__ import annotations

import functools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import polyformer as pf
from polyformer.errors import SpecError, WeightsError
from polyformer.families.fusion_in_decoder import reading_passages
from polyformer.generate import Hopeful, Limit, Power, Search, SpecialTokens, search
from polyformer.parts.model import TransformerPart
from polyformer.weights.files import SINGLE
from tests.families.cases import CASES, Case
from tests.families.parity import load, reference, transformers
from tests.parts.models import SHAPES, decoder

QUESTIONS, PASSAGES, LENGTH = 2, 3, 6


def case() -> Case:
    """T5 whose weights lie so far apart that it writes different things."""
    found = next(one for one in CASES if one.name == "t5")
    return Case("t5-fusion", found.model, found.config, found.keys | {"num_decoder_layers": 2}, "pairs", noise=0.4)


@functools.cache
def models() -> tuple[Any, TransformerPart, TransformerPart]:
    """The reference's T5, ours, and ours reading passages."""
    theirs, ours = reference(case())[0], load(case()).model
    model, report = pf.transplant(ours, reading_passages(ours.spec))  # type: ignore[arg-type]
    assert list(report.summary) == ["kept"]
    return theirs, ours, model.eval()


def draw() -> dict[str, Tensor]:
    """Passages of several lengths, one of them missing, and what was written so far."""
    chance = torch.Generator().manual_seed(3)
    ids = torch.randint(3, 49, (QUESTIONS, PASSAGES, LENGTH), generator=chance)
    lengths = torch.tensor([[6, 2, 5], [4, 6, 0]])
    written = torch.randint(3, 49, (QUESTIONS, 4), generator=chance)
    return {
        "input_ids": ids,
        "attention_mask": (torch.arange(LENGTH) < lengths[..., None]).long(),
        "decoder_input_ids": written,
    }


def memory_of(theirs: Any, data: dict[str, Tensor]) -> dict[str, Any]:
    """Return what the reference's decoder takes, when its encoder has read each passage alone."""
    ids, mask = (data[name].flatten(0, 1) for name in ("input_ids", "attention_mask"))
    hidden = theirs.encoder(ids, mask).last_hidden_state.reshape(len(data["input_ids"]), PASSAGES * LENGTH, -1)
    output = transformers.modeling_outputs.BaseModelOutput(hidden)
    return {"encoder_outputs": output, "attention_mask": data["attention_mask"].flatten(1)}


def test_one_passage_is_a_text() -> None:
    _, plain, fused = models()
    data = draw()
    ids, mask = data["input_ids"][:, 0], data["attention_mask"][:, 0]
    written = data["decoder_input_ids"]
    wanted = plain(ids, mask, written)
    for found in (fused(ids[:, None], mask[:, None], written), fused(ids, mask, written)):
        assert torch.equal(found.logits, wanted.logits)
        assert torch.equal(found.encoder_hidden, wanted.encoder_hidden)


def test_several_as_the_reference_s_t5_would() -> None:
    theirs, _, fused = models()
    data = draw()
    wanted = theirs(**memory_of(theirs, data), decoder_input_ids=data["decoder_input_ids"]).logits
    torch.testing.assert_close(fused(**data).logits, wanted, atol=1e-5, rtol=1e-5)
    whole = {name: one for name, one in data.items() if name != "attention_mask"}
    everything = theirs(
        **memory_of(theirs, data | {"attention_mask": torch.ones_like(data["attention_mask"])}),
        decoder_input_ids=data["decoder_input_ids"],
    )
    torch.testing.assert_close(fused(**whole).logits, everything.logits, atol=1e-5, rtol=1e-5)


def test_the_order_of_passages_does_not_matter() -> None:
    fused, data = models()[2].double(), draw()
    try:
        found = fused(**data).logits
        order = torch.tensor([2, 0, 1])
        turned = {name: data[name][:, order] for name in ("input_ids", "attention_mask")}
        torch.testing.assert_close(fused(**data | turned).logits, found, atol=1e-12, rtol=1e-12)
    finally:
        fused.float()


def test_passages_that_are_padding_are_ignored() -> None:
    _, _, fused = models()
    data = draw()
    found = fused(**data).logits
    more = {name: torch.cat((data[name], data[name][:, :2]), 1) for name in ("input_ids", "attention_mask")}
    more["attention_mask"][:, PASSAGES:] = 0
    torch.testing.assert_close(fused(**data | more).logits, found)
    fewer = {name: data[name][1:, :2] for name in ("input_ids", "attention_mask")}
    alone = fused(**fewer, decoder_input_ids=data["decoder_input_ids"][1:]).logits
    torch.testing.assert_close(alone[0], found[1])


def test_no_passage_knows_of_another() -> None:
    """But the decoder looks at all: what it says depends on each of them."""
    _, _, fused = models()
    data = draw()
    other = data["input_ids"].clone()
    other[0, 2, 0] += 1
    one, two = (fused(**data | {"input_ids": ids}) for ids in (data["input_ids"], other))
    same = (one.encoder_hidden == two.encoder_hidden).flatten(1).all(1)
    assert same.tolist() == [True, True, False, True, True, True]
    assert not torch.allclose(one.logits[0], two.logits[0])


@pytest.mark.parametrize("beams", [1, 3])
def test_it_writes_what_the_reference_s_search_writes(beams: int) -> None:
    theirs, _, fused = models()
    data = draw()
    settings = Search(beams, 1, Power(1.0), Limit(9), Hopeful())
    found = search(fused, data["input_ids"], data["attention_mask"], settings, SpecialTokens(0, 1, 0))
    # the reference may write the start token again
    options = {"num_beams": beams, "max_new_tokens": 9, "do_sample": False, "suppress_tokens": [0]}
    wanted = theirs.generate(**memory_of(theirs, data), **options, early_stopping=False, length_penalty=1.0)
    for row, hypotheses in zip(wanted.tolist(), found, strict=True):
        ids = row[1:]
        ids = ids[: ids.index(1)] if 1 in ids else ids
        assert hypotheses[0].ids == [token for token in ids if token]
    assert found[0][0].ids != found[1][0].ids


def test_gradients_reach_each_passage() -> None:
    _, _, fused = models()
    fused.zero_grad()
    fused(**draw()).logits.square().sum().backward()
    gradient = fused.get_parameter("source.tokens.weight").grad
    assert gradient is not None
    assert gradient.isfinite().all()
    fused.zero_grad()


class TestFolders:
    def test_a_t5_folder_that_says_so(self, tmp_path: Path) -> None:
        folder = tmp_path / "fid"
        shutil.copytree(reference(case())[1], folder)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"architectures": ["FiDT5"]}))
        loaded = pf.load(folder)
        assert torch.equal(loaded.model(**draw()).logits, models()[2](**draw()).logits)
        pf.save(loaded, tmp_path / "again")
        names = load_file(tmp_path / "again" / SINGLE).keys()
        assert "encoder.encoder.block.0.module.layer.0.SelfAttention.q.weight" in names
        assert "decoder.block.0.layer.0.SelfAttention.q.weight" in names
        again = pf.load(tmp_path / "again")
        assert again.spec == loaded.spec
        assert torch.equal(again.model(**draw()).logits, loaded.model(**draw()).logits)

    def test_a_bias_that_the_authors_version_would_look_at(self, tmp_path: Path) -> None:
        folder = tmp_path / "fid"
        shutil.copytree(reference(case())[1], folder)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"architectures": ["FiDT5"]}))
        tensors = load_file(folder / SINGLE)
        name = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
        save_file(tensors | {name: torch.zeros(8, 3)}, folder / SINGLE, {"format": "pt"})
        pf.load(folder)
        save_file(tensors | {name: torch.ones(8, 3)}, folder / SINGLE, {"format": "pt"})
        with pytest.raises(WeightsError, match=r"relative_attention_bias.weight' of .* is not what is computed"):
            pf.load(folder)

    def test_a_folder_of_ours(self, tmp_path: Path) -> None:
        pf.save(pf.loaded.Loaded(models()[2]), tmp_path / "own")
        assert torch.equal(pf.load(tmp_path / "own").model(**draw()).logits, models()[2](**draw()).logits)


def test_refused() -> None:
    _, plain, fused = models()
    data = draw()
    with pytest.raises(SpecError, match=r"passages are \[questions, passages, tokens\]"):
        fused(data["input_ids"][None], None, data["decoder_input_ids"])
    with pytest.raises(SpecError, match=r"the attention mask has shape \[2, 3, 5\], but the passages \[2, 3, 6\]"):
        fused(data["input_ids"], data["attention_mask"][..., 1:], data["decoder_input_ids"])
    with pytest.raises(SpecError, match="only a model that reads token ids with an encoder"):
        reading_passages(decoder(SHAPES["gpt"]))
    assert reading_passages(fused.spec) == fused.spec  # type: ignore[arg-type]
    assert plain.spec.bridge is None  # type: ignore[attr-defined]
