"""Rows of documents: what is asked for, by which chance, in which order; and that nothing is given away."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from polyformer.data import Document, MaskedTokens, NextToken, RowRecipe, TextRows, encode_texts, learn_text_tokenizer
from polyformer.data.checkpoint_tokenizer import TextTokenizer
from polyformer.data.masking import TextObjective
from polyformer.data.rows import EncodedTexts, TextBatch
from polyformer.data.text_tokenizer import encode_documents
from polyformer.data.vocabulary import TextTokenizerRecipe
from polyformer.errors import DataError, RunError, SpecError
from polyformer.families.language_model import LanguageModel
from polyformer.parts.model import TransformerPart
from polyformer.train.objectives import batch_loss
from tests.data.published import made

WORDS = ["the house sees a tree", "a tree finds the river", "the river leaves", "one house and the tree"] * 8
DOCUMENTS = [Document(str(i), f"{text}\n{text[::-1]}") for i, text in enumerate(WORDS)]


@pytest.fixture(scope="module")
def data() -> EncodedTexts:
    return encode_texts(learn_text_tokenizer(DOCUMENTS, TextTokenizerRecipe("byte_bpe", 290), masks=True), DOCUMENTS)


def reader(data: EncodedTexts, objective: TextObjective | None = None, **recipe: object) -> TextRows:
    return TextRows(data, RowRecipe(**{"length": 16, "tokens": 64, **recipe}), objective or NextToken())  # type: ignore[arg-type]


def model(data: EncodedTexts, **choices: object) -> TransformerPart:
    torch.manual_seed(0)
    sizes = {"vocabulary": data.tokenizer.vocabulary, "length": 16, "width": 16, "depth": 2, "heads": 2}
    made = LanguageModel(**{**sizes, **choices}).spec().build(dtype=torch.float64)  # type: ignore[arg-type]
    assert isinstance(made, TransformerPart)
    return made.eval()


class TestNextToken:
    def test_every_token_but_the_first_is_asked_for_once(self, data: EncodedTexts) -> None:
        batches = list(reader(data).in_order())
        asked = [label for batch in batches for label in batch.labels.flatten().tolist() if label >= 0]
        assert asked == data.flat.tolist()[1:]
        assert sum(batch.target_tokens for batch in batches) == len(data) - 1

    def test_labels_are_the_row_shifted_once(self, data: EncodedTexts) -> None:
        batch = next(reader(data))
        assert torch.equal(batch.labels[:, :-1], batch.input_ids[:, 1:])

    def test_the_last_row_is_padded(self, data: EncodedTexts) -> None:
        last = list(reader(data).in_order())[-1]
        assert last.attention_mask is not None
        assert torch.equal(last.attention_mask, last.labels >= 0)

    def test_apart_asks_for_nothing_across_documents(self, data: EncodedTexts) -> None:
        batches = list(reader(data, documents="apart").in_order())
        asked = [label for batch in batches for label in batch.labels.flatten().tolist() if label >= 0]
        firsts = set(data.starts.tolist())
        assert asked == [one for i, one in enumerate(data.flat.tolist()) if i not in firsts]

    @pytest.mark.parametrize(
        "attention", ["softmax", "tiled", "window", "local", "performer", "linear", "retention", "gmlp", "none"]
    )
    def test_no_future_is_given_away(self, data: EncodedTexts, attention: str) -> None:
        """Other tokens from some place on change no loss before it."""
        made, batch = model(data, attention=attention), next(reader(data))
        place = 9
        changed = batch.input_ids.clone()
        changed[:, place:] = torch.randint(5, data.tokenizer.vocabulary, changed[:, place:].shape)
        assert not torch.equal(changed, batch.input_ids)
        rows = [made(input_ids=ids).hidden for ids in (batch.input_ids, changed)]
        torch.testing.assert_close(rows[0][:, :place], rows[1][:, :place], rtol=0, atol=1e-12)
        assert attention == "none" or (rows[0][:, place] - rows[1][:, place]).abs().max() > 1e-6

    @pytest.mark.parametrize("attention", ["softmax", "window", "performer", "retention", "gmlp"])
    @pytest.mark.parametrize("objective", [NextToken(), MaskedTokens(share=0.5)], ids=["next", "masked"])
    def test_apart_in_one_row_is_each_document_alone(
        self, data: EncodedTexts, attention: str, objective: TextObjective
    ) -> None:
        """The gradients of a row of several documents are the sum of those of each by itself."""
        if objective.reads == "both ways" and attention == "retention":
            pytest.skip("retention reads forwards only")
        length, made = int(data.starts[3]) + 1, model(data, attention=attention, length=200, reads=objective.reads)
        batch = next(reader(data, objective, length=length, tokens=length, documents="apart").in_order())
        assert batch.document_ids is not None
        assert len(set(batch.document_ids.flatten().tolist())) >= 3
        together = gradients(made, [batch])
        apart = []
        for number in set(batch.document_ids.flatten().tolist()):
            own = batch.document_ids[0] == number
            labels = batch.labels[:, own]
            if bool((labels >= 0).any()):
                count = int((labels >= 0).sum())
                apart.append(TextBatch(batch.input_ids[:, own], labels, None, None, count, batch.rows))
        assert len(apart) >= 3
        for name, gradient in gradients(made, apart).items():
            torch.testing.assert_close(gradient, together[name], rtol=1e-9, atol=1e-10, msg=name)


def gradients(made: TransformerPart, batches: list[TextBatch]) -> dict[str, torch.Tensor]:
    made.zero_grad()
    for batch in batches:
        batch_loss(made, batch, 0.0).objective.backward()  # type: ignore[no-untyped-call]
    return {name: p.grad.clone() for name, p in made.named_parameters() if p.grad is not None}


class TestMaskedTokens:
    def test_shares(self, data: EncodedTexts) -> None:
        """15 % of a row's tokens; of these 80 % masks, 10 % other tokens, 10 % as they are, within three sigma."""
        rows = reader(data, MaskedTokens(), length=100, tokens=400)
        mask, asked, hidden, kept, real = data.tokenizer.mask_id, 0, 0, 0, 0
        for _ in range(150):
            batch = next(rows)
            labels = batch.labels
            places = labels >= 0
            assert torch.equal(batch.input_ids[~places], original(data, batch)[~places])
            asked += int(places.sum())
            real += int((batch.input_ids > 4).sum() + (batch.input_ids == mask).sum())
            hidden += int((batch.input_ids[places] == mask).sum())
            kept += int((batch.input_ids[places] == labels[places]).sum())
        assert asked / real == pytest.approx(0.15, abs=0.01)
        assert hidden / asked == pytest.approx(0.8, abs=3 * (0.16 / asked) ** 0.5)
        assert kept / asked == pytest.approx(0.1 + 0.1 / 285, abs=3 * (0.09 / asked) ** 0.5)

    def test_control_tokens_are_neither_asked_for_nor_drawn(self, data: EncodedTexts) -> None:
        for batch in reader(data, MaskedTokens(share=1.0, hidden=0.0, replaced=1.0)).in_order():
            asked = batch.labels >= 0
            assert int(batch.labels[asked].min()) > 4
            assert int(batch.input_ids[asked].min()) > 4

    def test_chance_is_of_the_row_and_the_epoch(self, data: EncodedTexts) -> None:
        small, large = (reader(data, MaskedTokens(), tokens=tokens) for tokens in (16, 160))
        first, again = ({int(r): row for b in one.in_order() for r, row in zip(b.rows, b.labels, strict=True)}
                        for one in (small, large))  # fmt: skip
        assert all(torch.equal(first[row], again[row]) for row in first)
        training = {int(r): row for _ in range(len(large)) for b in [next(large)] for r, row in zip(b.rows, b.labels)}  # noqa: B905
        assert any(not torch.equal(first[row], training[row]) for row in first), "training draws others"

    def test_whole_words(self, data: EncodedTexts) -> None:
        """All of a word's tokens are asked for, but for the last word, in which the share may end."""
        batch = next(reader(data, MaskedTokens(units="words"), length=64, tokens=64))
        text = data.tokenizer.tokens(original(data, batch)[0].tolist())
        asked = (batch.labels[0] >= 0).tolist()
        cut = sum(
            asked[i] != asked[i - 1]
            for i in range(1, 64)
            if text[i][0].isalnum() and text[i - 1][-1].isalnum() and text[i - 1] not in ("<s>", "</s>")
        )
        assert any(asked)
        assert cut <= 1

    def test_what_can_not_be(self, data: EncodedTexts) -> None:
        bare = encode_texts(learn_text_tokenizer(DOCUMENTS, TextTokenizerRecipe("byte_bpe", 290), False), DOCUMENTS)
        with pytest.raises(DataError, match="needs a mask token"):
            reader(bare, MaskedTokens())
        with pytest.raises(SpecError, match="add up to 1"):
            MaskedTokens(hidden=0.9, replaced=0.2)


def original(data: EncodedTexts, batch: TextBatch) -> torch.Tensor:
    length = batch.input_ids.shape[1]
    places = batch.rows[:, None] * length + np.arange(length)
    ids = torch.from_numpy(np.where(places < len(data), data.flat[np.minimum(places, len(data) - 1)], 0))
    return ids.long()


class TestOrder:
    @pytest.mark.parametrize("objective", [NextToken(), MaskedTokens()], ids=["next", "masked"])
    def test_gone_back_to_is_gone_on_with(self, data: EncodedTexts, objective: TextObjective) -> None:
        rows = reader(data, objective)
        for _ in range(len(rows) + 3):
            next(rows)
        state = rows.state()
        wanted = [next(rows) for _ in range(len(rows))]
        again = reader(data, objective)
        again.restore(state)
        for batch in wanted:
            other = next(again)
            assert torch.equal(batch.input_ids, other.input_ids)
            assert torch.equal(batch.labels, other.labels)

    def test_each_row_once_in_an_epoch(self, data: EncodedTexts) -> None:
        rows = reader(data)
        orders = [[int(row) for _ in range(len(rows)) for row in next(rows).rows] for _ in range(2)]
        assert orders[0] != orders[1]
        assert sorted(orders[0]) == sorted(orders[1]) == list(range(len(rows.items)))
        assert rows.epoch == 2

    def test_other_texts_are_refused(self, data: EncodedTexts) -> None:
        with pytest.raises(RunError, match="other training texts or batches"):
            reader(data).restore(reader(data, length=8).state())

    def test_what_can_not_be(self, data: EncodedTexts) -> None:
        with pytest.raises(SpecError, match="length should be at least 2, not 1"):
            RowRecipe(length=1)
        with pytest.raises(SpecError, match="a batch of 8 tokens can't hold a row of 16"):
            RowRecipe(length=16, tokens=8)
        with pytest.raises(DataError, match="texts of 0 tokens are too short"):
            reader(encode_texts(data.tokenizer, []))


def test_bos_and_eos_stand_once(tmp_path: Path) -> None:
    """Where a checkpoint's tokenizer puts them around every text by itself, and where it doesn't."""
    pytest.importorskip("sentencepiece")
    for name in ("llama, legacy", "llama", "gpt2"):
        tokenizer = TextTokenizer.load(made(tmp_path, name))
        (ids,) = encode_documents(tokenizer, ["The house\n" * 2000])
        ends = [one for one in (tokenizer.bos_id, tokenizer.eos_id) if one is not None]
        assert sum(ids.count(one) for one in set(ends)) == len(ends)
