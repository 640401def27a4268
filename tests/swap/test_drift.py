"""Drift against plain loops over the logits; streams, padding, and what can't be compared."""

from __future__ import annotations

import importlib
import json
import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from polyformer.errors import DataError, SpecError
from polyformer.parts import Chain, Linear, LMHead, Nth
from polyformer.swap import batches_of, drift
from tests.parts.models import Shape, encoder, pad, sentences, translator
from tests.swap.models import VOCABULARY, WIDTH, gpt, ids, made

MODULE = importlib.import_module("polyformer.swap.drift")


def other(model):
    """Return a model with the same spec and rather other weights."""
    found, generator = made(model.spec), torch.Generator().manual_seed(2)
    with torch.no_grad():
        for weight in found.parameters():
            weight += 0.5 * torch.randn(weight.shape, generator=generator, dtype=weight.dtype)
    return found


def by_hand(a: Tensor, b: Tensor) -> tuple[float, float, float, list[int]]:
    """Largest difference, mean KL, share of equal tops and which rows differ, of logits [N, V]."""
    largest, divergence, different = 0.0, 0.0, []
    for row, (one, two) in enumerate(zip(a.tolist(), b.tolist(), strict=True)):
        largest = max(largest, *(abs(x - y) for x, y in zip(one, two, strict=True)))
        sums = [math.log(sum(math.exp(x - max(r)) for x in r)) + max(r) for r in (one, two)]
        divergence += sum(
            math.exp(x - sums[0]) * ((x - sums[0]) - (y - sums[1])) for x, y in zip(one, two, strict=True)
        )
        if one.index(max(one)) != two.index(max(two)):
            different.append(row)
    return largest, divergence / len(a), 1 - len(different) / len(a), different


@pytest.fixture(params=[1, 2**24])
def chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Compare row by row, or all at once."""
    monkeypatch.setattr(MODULE, "CHUNK_BYTES", request.param)
    return request.param


class TestLogits:
    def test_by_the_formulas(self, chunk: int) -> None:
        a, b = made(gpt()), other(made(gpt()))
        found = drift(a, b, [ids()])
        logits = [model(ids()).logits.flatten(0, 1) for model in (a, b)]
        largest, divergence, same, different = by_hand(*logits)
        assert found.rows == 27
        assert found.largest == pytest.approx(largest)
        assert found.divergence == pytest.approx(divergence)
        assert found.same == pytest.approx(same)
        assert (found.first.sequence, found.first.position) == divmod(different[0], 9)
        assert found.first.tokens == tuple(int(one[different[0]].argmax()) for one in logits)

    def test_a_model_does_not_drift_from_itself(self, chunk: int) -> None:
        model = made(gpt())
        found = drift(model, model, [ids()])
        assert (found.largest, found.divergence, found.same, found.first) == (0.0, 0.0, 1.0, None)

    @pytest.mark.parametrize("side", ["left", "right"])
    def test_padding_is_left_out(self, side: str, chunk: int) -> None:
        a, b = made(gpt()), other(made(gpt()))
        rows = sentences((5, 3, 7))
        padded = dict(zip(("input_ids", "attention_mask"), pad(rows, side, 9), strict=True))
        found, expected = drift(a, b, [padded]), drift(a, b, (row[None] for row in rows))
        assert found.rows == expected.rows == 15
        assert found.largest == pytest.approx(expected.largest)
        assert found.divergence == pytest.approx(expected.divergence)
        assert (found.same, found.first) == (expected.same, expected.first)
        assert found.first is not None

    def test_the_first_difference_is_found_in_a_later_batch(self) -> None:
        a, b = made(gpt()), made(gpt())
        with torch.no_grad():
            b.target.positions.weight[6:] *= -5
        found = drift(a, b, [ids(2, 5), ids(1, 6), ids(3, 9)])
        assert found.first.sequence == 3
        assert found.first.position >= 6

    def test_encoder_decoder_models_compare_the_targets(self) -> None:
        a, b = made(translator(Shape())), other(made(translator(Shape())))
        source, mask = pad(sentences((5, 3)))
        target, target_mask = pad(sentences((4, 2), seed=1))
        given = {
            "input_ids": source,
            "attention_mask": mask,
            "decoder_input_ids": target,
            "decoder_attention_mask": target_mask,
        }
        logits = [model(**given).logits[target_mask.bool()] for model in (a, b)]
        found, (largest, divergence, *_) = drift(a, b, [given]), by_hand(*logits)
        assert found.rows == 6
        assert found.largest == pytest.approx(largest)
        assert found.divergence == pytest.approx(divergence)

    def test_classifiers_give_one_answer_a_sequence(self) -> None:
        spec = encoder(Shape()).replace(head=Chain((Nth(0), Linear(12, 3))))
        a, b = made(spec), other(made(spec))
        rows, mask = pad(sentences((5, 3, 4)))
        found = drift(a, b, [{"input_ids": rows, "attention_mask": mask}])
        assert found.rows == 3
        assert found.divergence == pytest.approx(by_hand(a(rows, mask).logits, b(rows, mask).logits)[1])

    def test_token_classifiers(self) -> None:
        spec = encoder(Shape()).replace(head=Linear(12, 3))
        a, b = made(spec), other(made(spec))
        rows, mask = pad(sentences((5, 3, 4)))
        assert drift(a, b, [{"input_ids": rows, "attention_mask": mask}]).rows == 12


class TestHidden:
    def test_models_without_a_head(self, chunk: int) -> None:
        a, b = made(encoder(Shape())), other(made(encoder(Shape())))
        rows, mask = pad(sentences((5, 3)), "left")
        found = drift(a, b, [{"input_ids": rows, "attention_mask": mask}])
        hidden = [model(rows, mask).hidden[mask.bool()].detach() for model in (a, b)]
        assert found.rows == 8
        assert found.largest == pytest.approx(float((hidden[0] - hidden[1]).abs().max()))
        cosines = (hidden[0] * hidden[1]).sum(-1) / hidden[0].norm(dim=-1) / hidden[1].norm(dim=-1)
        assert found.cosine == pytest.approx(float(cosines.mean()))
        assert found.divergence is found.same is found.first is None

    def test_where_one_has_none(self) -> None:
        model = made(gpt())
        bare = made(gpt().replace(head=None, ties=()))
        assert drift(model, bare, [ids()]).cosine == pytest.approx(1.0)


class TestStreams:
    def test_batches_are_asked_for_one_at_a_time(self) -> None:
        model, seen = made(gpt(1)), []

        def batches() -> Iterator[Tensor]:
            for i in range(4):
                seen.append(calls["n"])
                yield ids(1, 3 + i)

        calls = {"n": 0}
        model.target.register_forward_hook(lambda *_: calls.update(n=calls["n"] + 1))
        assert drift(model, model, batches()).rows == 3 + 4 + 5 + 6
        assert seen == [0, 2, 4, 6]

    def test_logits_of_a_batch_are_never_held_at_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(MODULE, "CHUNK_BYTES", 8 * VOCABULARY * 4)
        model, rows = made(gpt(1)), []
        model.head.register_forward_hook(lambda part, given, out: rows.append(out.numel() // VOCABULARY))
        assert drift(model, model, [ids(3, 9)]).rows == 27
        assert max(rows) == 4
        assert sum(rows) == 2 * 27

    def test_models_are_as_they_were_afterwards(self) -> None:
        model, still = made(gpt()).train(), made(gpt())
        head = model.head
        assert drift(model, still, [ids()]).largest == 0  # dropout is off
        with pytest.raises(SpecError, match="longer than the model's 32 positions"):
            drift(model, still, [ids(1, 40)])
        assert model.training
        assert model.head is head
        assert not still.training


class TestTexts:
    def test_in_order_and_padded(self) -> None:
        texts = ["abc", "a", "abcd"]
        found = list(batches_of(iter(texts), lambda text: [ord(letter) - 96 for letter in text], size=2))
        assert [one["input_ids"].tolist() for one in found] == [[[1, 2, 3], [1, 0, 0]], [[1, 2, 3, 4]]]
        assert [one["attention_mask"].tolist() for one in found] == [[[1, 1, 1], [1, 0, 0]], [[1, 1, 1, 1]]]
        assert drift(made(gpt()), made(gpt()), found).rows == 8

    def test_a_text_without_tokens(self) -> None:
        with pytest.raises(DataError, match="text 3 has no tokens"):
            list(batches_of(["a", "b", ""], lambda text: [1] * len(text), size=2))


class TestRefused:
    def test_other_vocabularies(self) -> None:
        spec = gpt(tied=False)
        with pytest.raises(SpecError, match="answers of 23 and of 20 values can't be compared"):
            drift(made(spec), made(spec.replace(head=LMHead.of_width(WIDTH, 20))), [ids()])

    def test_rows_of_another_number(self) -> None:
        spec = encoder(Shape())
        a, b = made(spec.replace(head=Linear(12, 3))), made(spec.replace(head=Chain((Nth(0), Linear(12, 3)))))
        with pytest.raises(SpecError, match=r"rows of different numbers, \[3, 9\] and \[3, 1\], of the same inputs"):
            drift(a, b, [ids() % 17])

    @pytest.mark.parametrize("inputs", [[], [{"input_ids": ids(), "attention_mask": torch.zeros(3, 9)}]])
    def test_nothing_to_compare(self, inputs: list[object]) -> None:
        with pytest.raises(DataError, match="there are no inputs to compare the models on"):
            drift(made(gpt()), made(gpt()), inputs)

    def test_answers_that_are_no_numbers(self) -> None:
        a, b = made(gpt()), made(gpt())
        with torch.no_grad():
            b.decoder.norm.weight.fill_(float("nan"))
        with pytest.raises(SpecError, match="a model's answers are no numbers; its weights may be damaged"):
            drift(a, b, [ids()])

    def test_an_encoder_decoder_model_without_targets(self) -> None:
        model = made(translator(Shape()))
        with pytest.raises(SpecError, match="needs decoder_input_ids"):
            drift(model, model, [ids() % 17])


class TestTold:
    def test_as_data(self) -> None:
        a, b = made(gpt()), other(made(gpt()))
        found = drift(a, b, [ids()])
        data = json.loads(json.dumps(found.to_data()))
        assert data["first"] == {
            "sequence": found.first.sequence,
            "position": found.first.position,
            "tokens": list(found.first.tokens),
        }
        assert data["divergence"] == found.divergence
        assert "cosine" not in data
        assert "first" not in drift(a, a, [ids()]).to_data()

    def test_as_text(self) -> None:
        a, b = made(gpt()), other(made(gpt()))
        assert str(drift(a, b, [ids()])).startswith("27 rows: largest logit difference ")
        assert "first different token: sequence 0, position " in str(drift(a, b, [ids()]))
        assert "first" not in str(drift(a, a, [ids()]))
        bare = made(encoder(Shape()))
        told = "27 hidden rows: largest difference 0, mean cosine 1.000000"
        assert str(drift(bare, bare, [ids() % 17])) == told
