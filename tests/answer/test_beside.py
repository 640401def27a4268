"""What lies beside a model is not lost when it is saved, in the reference's layout or, with other parts, in ours."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

import polyformer as pf
from polyformer.parts import Mean
from polyformer.swap import Conversion
from tests.answer.models import bert

STEPS = [
    {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
    {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
]
TEXTS = ["the cat sat on the mat.", "a dog ran"]


def sentence(folder: Path, inner: str = "") -> None:
    """Save a folder of sentence-transformers that takes the greatest values and cuts texts to 5 tokens."""
    bert(folder / inner, "BertModel")
    (folder / inner / "sentence_bert_config.json").write_text('{"max_seq_length": 5, "do_lower_case": false}')
    (folder / "modules.json").write_text(json.dumps([{**STEPS[0], "path": inner}, STEPS[1]]))
    (folder / "1_Pooling").mkdir()
    said = {"word_embedding_dimension": 16, "pooling_mode_max_tokens": True, "pooling_mode_mean_tokens": False}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(said))


@pytest.mark.parametrize("inner", ["", "0_Transformer"])
def test_pooling_is_kept(tmp_path: Path, inner: str) -> None:
    sentence(tmp_path / "theirs", inner)
    loaded = pf.load(tmp_path / "theirs")
    vectors = loaded.embed(TEXTS)
    assert not torch.allclose(vectors, loaded.embed(TEXTS, Mean()))
    pf.save(loaded, tmp_path / "ours")
    again = pf.load(tmp_path / "ours")
    assert (tmp_path / "ours" / "config.json").exists()
    assert again.embed(TEXTS).equal(vectors)
    assert again.pooling is not None
    assert again.pooling.length == 5


def test_pooling_is_kept_with_other_parts(tmp_path: Path) -> None:
    sentence(tmp_path / "theirs")
    loaded = pf.load(tmp_path / "theirs")
    made, _ = pf.transplant(loaded.model, Conversion(norm="rms"))
    changed = dataclasses.replace(loaded, model=made)
    pf.save(changed, tmp_path / "ours")
    again = pf.load(tmp_path / "ours")
    assert (tmp_path / "ours" / "spec.json").exists()
    assert again.embed(TEXTS).equal(changed.embed(TEXTS))
    assert again.pooling is not None
    assert again.pooling.length == 5
