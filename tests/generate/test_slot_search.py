"""Search in the slots of a runner: what the search of a batch finds, whoever runs the model, and nothing is left."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from polyformer.errors import RunError, SpecError
from polyformer.generate import (
    Counts,
    Diverse,
    Hypothesis,
    Limit,
    NoRepeatNgram,
    Power,
    Rows,
    Runner,
    Search,
    Text,
    TorchRunner,
    search,
    search_slots,
    translate,
)
from polyformer.native.library import library
from polyformer.native.machine import Machine
from polyformer.native.runner import runner
from polyformer.parts.model import TransformerPart
from tests.generate.models import BOS, SPECIAL, UNK, Words, sentences, tiny
from tests.generate.writers import writer

LENGTHS = [5, 2, 9, 4, 7, 3, 6]
SEARCHES = [
    Search(1, limit=Limit(9), forbidden=(UNK,)),
    Search(4, 3, limit=Limit(12, 2.0, 0), forbidden=(UNK, 7)),
    Search(3, 2, Power(1.0), Limit(8, unfinished="end"), first=6),
    Search(4, 4, Power(0.0), Limit(6), diverse=Diverse(2, 0.7)),
    Search(2, 1, limit=Limit(7), processors=(NoRepeatNgram(2),)),
]
native_too = pytest.mark.parametrize(
    "kind", ["torch", pytest.param("native", marks=pytest.mark.skipif(library() is None, reason="not compiled here"))]
)


def runner_of_kind(kind: str, model: TransformerPart, slots: int) -> Runner:
    return TorchRunner(model, slots) if kind == "torch" else runner(model, "fp32", Machine(slots, 64, 2))


def texts(lengths: list[int]) -> list[Text]:
    ids, mask = sentences(lengths)
    return [Text((BOS,), row[real].tolist()) for row, real in zip(ids, mask, strict=True)]


def same(found: list[list[Hypothesis]], wanted: list[list[Hypothesis]]) -> None:
    assert [[one.ids for one in each] for each in found] == [[one.ids for one in each] for each in wanted]
    for each, other in zip(found, wanted, strict=True):
        assert [one.score for one in each] == pytest.approx([one.score for one in other], abs=1e-5)


@native_too
@pytest.mark.parametrize("settings", SEARCHES, ids=lambda one: f"{one.beams} beams")
def test_the_same_as_in_a_batch(kind: str, settings: Search) -> None:
    """Three sentences at once, so that the others come in while some are being written."""
    model = tiny(seed=4, ending=0.5)
    wanted = search(model, *sentences(LENGTHS), settings, SPECIAL)
    done: list[int] = []
    run, counts = runner_of_kind(kind, model, 3 * settings.beams), Counts()
    found = search_slots(run, texts(LENGTHS), settings, SPECIAL, counts, done.append)
    same(found, wanted)
    assert sum(done) == len(LENGTHS)
    assert 0 < counts.steps < counts.rows <= counts.steps * run.slots
    assert all(run.length(slot) == 0 for slot in range(run.slots))


@native_too
def test_a_decoder_alone_is_searched_behind_its_prompts(kind: str) -> None:
    """Each hypothesis has the log-probability that the model gives to all of its tokens at once."""
    model = writer("learned").float()
    prompts = [[5, 9, 8], [4], [12, 6]]
    run = runner_of_kind(kind, model, 6)
    found = search_slots(run, [Text(prompt) for prompt in prompts], Search(3, 3, Power(1.0), Limit(5)), SPECIAL)
    for prompt, hypotheses in zip(prompts, found, strict=True):
        assert len({tuple(one.ids) for one in hypotheses}) == 3
        for one in hypotheses:
            written = one.ids if len(one.ids) == 5 else [*one.ids, SPECIAL.eos]
            with torch.no_grad():
                likely = model(torch.tensor([[*prompt, *written]])).logits[0].log_softmax(-1)
            total = sum(float(likely[len(prompt) + i - 1, token]) for i, token in enumerate(written))
            assert one.log_probability == pytest.approx(total, abs=1e-3)


@native_too
def test_the_best_tokens_are_those_of_all_scores(kind: str) -> None:
    model = tiny(vocabulary=200, seed=3)
    with torch.no_grad():
        model.head.projection.weight[17] = model.head.projection.weight[130]  # type: ignore[union-attr, index]
        model.head.projection.bias[[17, 130]] += 5.0  # type: ignore[union-attr, index, operator]
    run: Any = runner_of_kind(kind, model, 4)
    run.read({slot: [5 + slot, 2] for slot in range(4)})
    rows = ([0, 1, 2, 3], [0, 0, 0, 0], [1, 9, 9, 1])
    scores = torch.as_tensor(run.step(Rows(*map(list, rows)), [0, 2, 3])).log_softmax(-1)
    for slot in range(4):
        run.truncate(slot, 0)
    likely, ids = (torch.as_tensor(one) for one in run.best(Rows(*map(list, rows)), [0, 2, 3], 6, [40, 3, 11]))
    scores[:, [3, 11, 40]] = float("-inf")
    wanted = scores.sort(descending=True, stable=True)
    assert ids.equal(wanted.indices[:, :6])
    assert ids[0, :2].tolist() == [17, 130]
    torch.testing.assert_close(likely, wanted.values[:, :6], atol=2e-5, rtol=0)


@native_too
def test_more_candidates_than_tokens_and_damaged_weights(kind: str) -> None:
    model, few = tiny(vocabulary=7, seed=1), [Text((BOS,), [5, 4, 2])]
    settings = Search(5, 5, Power(0.0), Limit(2))
    run = runner_of_kind(kind, model, 10)
    wanted = search(model, torch.tensor([few[0].source]), None, settings, SPECIAL)
    same(search_slots(run, few, settings, SPECIAL), wanted)
    with torch.no_grad():
        model.head.projection.weight[5, 2] = float("nan")  # type: ignore[union-attr, index]
    with pytest.raises(RunError, match="no numbers"):
        search_slots(runner_of_kind(kind, model, 10), few, settings, SPECIAL)


def test_what_a_runner_can_t_search_is_refused() -> None:
    run = TorchRunner(tiny(positions=6), 3)
    for text, settings, told in (
        (Text((BOS,), [5]), Search(4), "4 beams needs as many slots; there are 3"),
        (Text((), [5]), Search(3), "at least one token"),
        (Text((BOS,)), Search(3), "needs a source"),
        (Text((BOS,), [13]), Search(3), "outside of the vocabulary of 13"),
        (Text((BOS,), [5] * 7), Search(3), "7 tokens is longer than the model's 6"),
        (Text((BOS,), [5]), Search(3, forbidden=(13,)), "no token 13 in a vocabulary of 13"),
    ):
        with pytest.raises(SpecError, match=told):
            search_slots(run, [text], settings, SPECIAL)


@native_too
def test_translations_are_the_same(kind: str) -> None:
    model, tokenizer = tiny(seed=4, ending=0.5), Words("a b c d e f g h i")
    given = ["a b c", "", "d", "e f g h i a b", "c b a"]
    done: list[int] = []
    settings, counts = Search(3, 2, limit=Limit(9)), Counts()
    found = translate(runner_of_kind(kind, model, 6), tokenizer, given, settings, None, 1, done.append, counts)
    wanted = translate(model, tokenizer, given, settings)
    assert [[one.ids for one in each] for each in found] == [[one.ids for one in each] for each in wanted]
    assert sum(done) == len(given)
    assert counts.written == sum(len(each[0].ids) + 1 for each, text in zip(wanted, given, strict=True) if text)
