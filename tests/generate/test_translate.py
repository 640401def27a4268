"""Texts to translations, in order, whatever batches they go through."""

from __future__ import annotations

import json
import sys

import pytest

from polyformer.errors import DataError
from polyformer.generate import Limit, Search, search, translate
from tests.generate.models import SPECIAL, Words, tiny

WORDS = "a b c d e f g h i"
TEXTS = ["a b c", "", "d", "e f g h i a b", "  \n", "c b a", "h"]


def test_translations_come_in_the_order_of_the_texts() -> None:
    model, tokenizer = tiny(seed=4, ending=0.5), Words(WORDS)
    settings = Search(beams=3, nbest=2, limit=Limit(9))
    together = translate(model, tokenizer, TEXTS, settings)
    for text, found in zip(TEXTS, together, strict=True):
        alone = translate(model, tokenizer, [text], settings)[0]
        assert [t.ids for t in found] == [t.ids for t in alone]
        assert [t.score for t in found] == pytest.approx([t.score for t in alone], abs=1e-5)
        assert [t.text for t in found] == [" ".join(t.tokens).replace("<unk>", "").strip() for t in found]


@pytest.mark.parametrize("batch_tokens", [1, 12, 40, 10_000])
def test_the_batch_size_changes_nothing(batch_tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = tiny(seed=4, ending=0.5), Words(WORDS)
    batches: list[tuple[int, int]] = []

    def counting(model, ids, *rest):  # type: ignore[no-untyped-def]
        batches.append(tuple(ids.shape))
        return search(model, ids, *rest)

    expected = [[t.ids for t in found] for found in translate(model, tokenizer, TEXTS)]
    monkeypatch.setattr(sys.modules[translate.__module__], "search", counting)
    found = translate(model, tokenizer, TEXTS, batch_tokens=batch_tokens)
    assert [[t.ids for t in one] for one in found] == expected
    assert sum(rows for rows, _ in batches) == 5
    assert all(rows == 1 or rows * width * 4 <= batch_tokens for rows, width in batches)
    assert [width for _, width in batches] == sorted((width for _, width in batches), reverse=True)


def test_white_space_is_translated_to_nothing_without_the_model() -> None:
    (found,) = translate(tiny(), Words(WORDS), [" \t\n"])
    assert [t.text for t in found] == [""]
    assert translate(tiny(), Words(WORDS), []) == []


def test_progress_counts_every_text() -> None:
    counts: list[int] = []
    translate(tiny(), Words(WORDS), TEXTS, batch_tokens=20, progress=counts.append)
    assert sum(counts) == len(TEXTS)
    assert len(counts) > 2


def test_a_text_longer_than_the_positions_is_refused_with_both_lengths() -> None:
    with pytest.raises(DataError, match=r"text 2 has 8 tokens, but the model has only 6 positions.*'e f g h i a b'"):
        translate(tiny(positions=6), Words(WORDS), ["a", "e f g h i a b"])


def test_the_target_language_reaches_the_tokenizer() -> None:
    tokenizer = Words(WORDS)
    translate(tiny(), tokenizer, ["a", "b"], target_language="de")
    assert tokenizer.asked == ["de", "de"]


def test_a_translation_goes_into_json() -> None:
    best = translate(tiny(ending=1.0), Words(WORDS), ["a b"], Search(nbest=2))[0][0]
    read = json.loads(json.dumps(best.to_data()))
    assert set(read) == {"text", "score", "log_probability", "tokens"}
    assert read["score"] == best.score < 0
    assert SPECIAL.eos not in best.ids
