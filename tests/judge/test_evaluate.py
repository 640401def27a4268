"""Held-out loss against the plain computation, and the evaluation that puts all scores together."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch.nn import functional as F

from polyformer.data.batches import Batches, BatchRecipe, encode_pairs
from polyformer.data.pairs import Pair
from polyformer.errors import DataError
from polyformer.generate import Limit, Search, translate
from polyformer.judge import HeldOut, bleu, chrf, evaluate, held_out, held_out_loss
from tests.generate.models import Words, tiny

TOKENIZER = Words("a b c d e f g h i")
PAIRS = [
    Pair("a b c", "c b a d", "en", "de"),
    Pair("d", "e", "en", "de"),
    Pair("f g h i a", "i", "en", "fr"),
    Pair("b b", "a a a a a a", "en", "de"),
    Pair("i", "h g", "en", "fr"),
]


def plain_loss(model: torch.nn.Module, pairs: list[Pair]) -> tuple[float, int]:
    """Return (nats, tokens), one pair at a time and with all logits."""
    nats, tokens = 0.0, 0
    for pair in pairs:
        source, target = TOKENIZER.encode_source(pair.source), TOKENIZER.encode_target(pair.target)
        with torch.no_grad():
            read = torch.tensor([[TOKENIZER.bos_id, *target[:-1]]])
            logits = model(torch.tensor([source]), decoder_input_ids=read).logits[0]
        nats += float(F.cross_entropy(logits.double(), torch.tensor(target), reduction="sum"))
        tokens += len(target)
    return nats, tokens


@pytest.mark.parametrize("budget", [8, 20, 1000])
@pytest.mark.parametrize("rows", [1, 3, 10**6])
def test_held_out_loss_equals_the_plain_one(budget: int, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(held_out, "CHUNK_BYTES", rows * 4 * 13)
    model = tiny(seed=1)
    batches = Batches(encode_pairs(TOKENIZER, PAIRS, BatchRecipe()), BatchRecipe(tokens=budget))
    found = held_out_loss(model, batches.in_order())
    nats, tokens = plain_loss(model, PAIRS)
    assert found.tokens == tokens == 19
    assert found.nats == pytest.approx(nats, rel=1e-5)
    assert found.loss == pytest.approx(nats / tokens, rel=1e-5)
    assert found.perplexity == pytest.approx(math.exp(nats / tokens), rel=1e-4)


def test_a_model_that_knows_nothing_has_the_vocabulary_as_perplexity() -> None:
    model = tiny()
    with torch.no_grad():
        for parameter in model.head.parameters():  # type: ignore[union-attr]
            parameter.zero_()
    batches = Batches(encode_pairs(TOKENIZER, PAIRS, BatchRecipe()), BatchRecipe())
    assert held_out_loss(model.train(), batches.in_order()).perplexity == pytest.approx(13, rel=1e-5)
    assert model.training


def test_held_out_losses_add_up_by_tokens() -> None:
    both = HeldOut(30.0, 10) + HeldOut(10.0, 90)
    assert both.loss == 0.4
    assert HeldOut(1e6, 1).perplexity == math.inf


def test_no_held_out_tokens_are_refused() -> None:
    with pytest.raises(DataError, match="no held-out"):
        held_out_loss(tiny(), [])


def test_each_direction_is_judged_for_itself() -> None:
    model, settings = tiny(seed=3, ending=0.5), Search(beams=2, limit=Limit(8))
    counts: list[int] = []
    found = evaluate(model, TOKENIZER, PAIRS, settings, counts.append)
    assert [direction.name for direction in found.directions] == ["en-de", "en-fr"]
    for direction, own in zip(found.directions, ([PAIRS[0], PAIRS[1], PAIRS[3]], [PAIRS[2], PAIRS[4]]), strict=True):
        texts = [one[0].text for one in translate(model, TOKENIZER, [pair.source for pair in own], settings)]
        references = [pair.target for pair in own]
        assert [t.text for t in direction.translations] == texts
        assert direction.bleu == bleu(texts, references, "de")
        assert direction.chrf == chrf(texts, references)
        assert direction.held_out.nats == pytest.approx(plain_loss(model, own)[0], rel=1e-5)
    assert found.held_out.nats == pytest.approx(plain_loss(model, PAIRS)[0], rel=1e-5)
    assert sum(counts) == len(PAIRS)


def test_an_evaluation_goes_into_json() -> None:
    found = evaluate(tiny(), TOKENIZER, PAIRS, Search(beams=1, limit=Limit(8)))
    read = json.loads(json.dumps(found.to_data()))
    assert set(read) == {"directions", "held_out", "search", "seconds"}
    assert set(read["directions"][0]) == {"direction", "pairs", "bleu", "chrf", "held_out"}
    assert read["held_out"]["tokens"] == 19


def test_evaluating_on_nothing_is_refused() -> None:
    with pytest.raises(DataError, match="no pairs"):
        evaluate(tiny(), TOKENIZER, [])


def test_targets_longer_than_a_usual_batch_are_measured_too() -> None:
    long = Pair("a", " ".join(["b"] * 5000), "en", "de")
    found = evaluate(tiny(layers=1), TOKENIZER, [long, PAIRS[0]], Search(beams=1, limit=Limit(3)))
    assert found.held_out.tokens == 5001 + 5
