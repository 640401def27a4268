"""Encoder–decoders put together of two published models: older files, and pairs that can't be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import polyformer as pf
from polyformer.errors import SpecError
from polyformer.families import read_family
from polyformer.weights.files import SINGLE
from tests.families.cases import CASES
from tests.families.parity import load, reference

BY_NAME = {case.name: case for case in CASES}
CASE = BY_NAME["vision-encoder-decoder"]

GENERAL: dict[str, Any] = {
    "_name_or_path": "",
    "bad_words_ids": None,
    "chunk_size_feed_forward": 0,
    "cross_attention_hidden_size": None,
    "diversity_penalty": 0.0,
    "do_sample": False,
    "finetuning_task": None,
    "forced_bos_token_id": None,
    "id2label": {"0": "LABEL_0", "1": "LABEL_1"},
    "is_encoder_decoder": False,
    "label2id": {"LABEL_0": 0, "LABEL_1": 1},
    "max_length": 20,
    "no_repeat_ngram_size": 0,
    "num_beams": 1,
    "output_attentions": False,
    "prefix": None,
    "problem_type": None,
    "pruned_heads": {},
    "return_dict": True,
    "sep_token_id": None,
    "task_specific_params": None,
    "temperature": 1.0,
    "tie_encoder_decoder": False,
    "tie_word_embeddings": True,
    "tokenizer_class": None,
    "torch_dtype": None,
    "torchscript": False,
    "transformers_version": "4.15.0",
    "typical_p": 1.0,
    "use_bfloat16": False,
}
"""What older files hold in the configuration of each side beside its own keys."""


def config(**changes: dict[str, Any]) -> dict[str, Any]:
    """Return the case's configuration with keys of its sides changed."""
    told: dict[str, Any] = json.loads((reference(CASE)[1] / "config.json").read_text())
    for side, some in changes.items():
        told[side] |= some
    return told


def test_older_files(tmp_path: Path) -> None:
    """Both sides' configurations were complete once, and causal masks were held as tensors."""
    model, folder = reference(CASE)
    told = config(
        encoder=GENERAL | {"architectures": ["ViTModel"], "add_cross_attention": False, "is_decoder": False},
        decoder=GENERAL | {"architectures": ["GPT2LMHeadModel"], "n_ctx": 16, "summary_type": "cls_index"},
    )
    (tmp_path / "config.json").write_text(json.dumps(told))
    tensors = load_file(folder / SINGLE)
    triangle = torch.ones(16, 16, dtype=torch.bool).tril().view(1, 1, 16, 16)
    tensors |= {f"decoder.transformer.h.{i}.attn.bias": triangle.clone() for i in range(2)}
    tensors["decoder.lm_head.weight"] = tensors["decoder.transformer.wte.weight"].clone()
    save_file(tensors, tmp_path / SINGLE)
    data = CASE.inputs()
    older: Any = pf.load(tmp_path).model
    with torch.no_grad():
        found, wanted = older(**data).logits, model(**data).logits
    real = data["decoder_attention_mask"].bool()
    torch.testing.assert_close(found[real], wanted[real], atol=1e-5, rtol=1e-5)


def test_an_encoder_without_a_pooler(tmp_path: Path) -> None:
    """Its weights are never used; where a file has none, none are saved."""
    folder = reference(CASE)[1]
    tensors = {name: one for name, one in load_file(folder / SINGLE).items() if "pooler" not in name}
    save_file(tensors, tmp_path / SINGLE)
    (tmp_path / "config.json").write_text(json.dumps(config()))
    loaded: Any = pf.load(tmp_path)
    data = CASE.inputs()
    with torch.no_grad():
        assert loaded.model(**data).logits.equal(load(CASE).model(**data).logits)  # type: ignore[operator]
    pf.save(loaded, tmp_path / "again")
    assert load_file(tmp_path / "again" / SINGLE).keys() == tensors.keys()


def test_rows_are_projected_on_their_way_to_the_decoder() -> None:
    """Where the widths differ there is a bridge; what is told of the encoder is what it gave."""
    model: Any = load(BY_NAME["vision-encoder-decoder-swin-gpt2"]).model
    images = torch.randn(1, 3, 37, 27)
    with torch.no_grad():
        out = model(pixel_values=images, decoder_input_ids=torch.tensor([[3]]))
        memory = model.encode(images)
    assert out.encoder_hidden.shape == (1, 20, 16)
    assert memory.hidden.shape == (1, 20, 12)
    assert load(BY_NAME["vision-encoder-decoder-swin-bert"]).spec.bridge is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"encoder": {"model_type": "beit"}},
            "encoder should be the configuration of one of vit, deit, swin, not of 'beit'",
        ),
        (
            {"decoder": {"model_type": "trocr"}},
            "decoder should be the configuration of one of gpt2, bert, not of 'trocr'",
        ),
        ({"decoder": {"add_cross_attention": False}}, "the decoder lacks cross-attention"),
        ({"encoder": {"patch_sizes": 3}}, "a file: encoder has a key 'patch_sizes'"),
        ({"encoder": {"auto_map": {}}}, "asks to run program code"),
    ],
)
def test_pairs_that_can_not_be(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        read_family(config(**changes), "a file")
    with pytest.raises(SpecError, match=r"encoder should be the configuration of one of .* not of None"):
        read_family({"model_type": "vision-encoder-decoder"}, "a file")


def test_the_configuration_survives_its_files() -> None:
    family = load(CASE).family
    assert family is not None
    assert type(family).from_json(family.to_json()) == family
