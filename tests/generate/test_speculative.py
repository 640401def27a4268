"""Guessing changes the time that writing takes, and nothing else: the same tokens, or the same distribution."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from polyformer.errors import SpecError
from polyformer.generate import (
    Capacity,
    Draft,
    Engine,
    Guesser,
    MinP,
    NoRepeatNgram,
    PromptLookup,
    Request,
    Sampling,
    Speculation,
    TorchRunner,
    early_exit,
)
from polyformer.generate.processors import Written
from polyformer.generate.sampling import Chooser
from polyformer.generate.speculative import Guess, judge
from polyformer.parts.model import TransformerPart
from tests.generate.models import BOS
from tests.generate.test_engine import alone, same
from tests.generate.writers import ids, requests, writer

EAGER = Speculation(4, trial=10**6)


def close(model: TransformerPart, noise: float = 0.05) -> TransformerPart:
    """Return a model that is nearly the same."""
    torch.manual_seed(8)
    other = model.spec.build(dtype=torch.float64)
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(torch.randn_like(parameter) * noise)
    assert isinstance(other, TransformerPart)
    return other.eval()


def guessers(model: TransformerPart) -> list[Guesser]:
    """Return every way of guessing."""
    return [
        PromptLookup(),
        Draft(TorchRunner(close(model), 4), 0.1),
        Draft(TorchRunner(early_exit(model, 1), 2), 0.1),
    ]


@pytest.mark.parametrize("way", range(3))
@pytest.mark.parametrize("kind", ["dense", "windowed", "learned"])
def test_greedy_is_the_same(kind: str, way: int) -> None:
    """With several at once, little memory, and processors that look at what was written."""
    asked = [
        Request(one.prompt, Sampling(limit=20, processors=(NoRepeatNgram(3),) if i % 2 else ()), one.ends)
        for i, one in enumerate(requests(kind, 8))
    ]
    wanted, model = alone(kind, asked), writer(kind)
    runner = TorchRunner(model, 4)
    memory = 3 * runner.bytes_for(64)
    engine = Engine(runner, Capacity(memory=memory, rows=32), guessers(model)[way], EAGER)
    handles = [engine.submit(one) for one in asked]
    while engine.step():
        assert engine.bytes <= memory
    for handle, answer in zip(handles, wanted, strict=True):
        same(handle.result(), answer)
    assert engine.bytes == 0
    assert 0 < engine.guesses.taken <= engine.guesses.guessed
    assert engine.guesses.gain > 1


def test_fewer_passes() -> None:
    """A model that is asked what it would say itself is always right."""
    model = writer()
    engine = Engine(TorchRunner(model, 1), None, Draft(TorchRunner(model, 1), 0.1), EAGER)
    answer = engine.submit(Request([5, 6], Sampling(limit=40))).result()
    same(answer, alone("dense", [Request([5, 6], Sampling(limit=40))])[0])
    assert engine.guesses.acceptance == 1
    assert engine.guesses.gain > 4
    assert engine.counts.steps == 9
    assert engine.counts.written == 40


def test_what_can_not_go_back_is_not_guessed_for() -> None:
    for kind in ("recurrent", "encoder-decoder"):
        prompt, source = ([BOS], ids(9, 1)) if kind == "encoder-decoder" else (ids(9, 1), None)
        request = Request(prompt, Sampling(limit=20), source=source)
        engine = Engine(TorchRunner(writer(kind), 1), None, PromptLookup(), EAGER)
        same(engine.submit(request).result(), alone(kind, [request])[0])
        assert (engine.guesses.passes == 0) == (kind == "recurrent")


def test_off_by_itself_where_it_loses() -> None:
    class Wrong(PromptLookup):
        asked = 0

        def guess(self, number: int, text: Written, count: int, chooser: Chooser) -> Guess:
            Wrong.asked += 1
            return Guess([0] * count)

    engine = Engine(TorchRunner(writer(), 1), None, Wrong(), Speculation(3, trial=5))
    request = Request([5, 6], Sampling(limit=30))
    same(engine.submit(request).result(), alone("dense", [request])[0])
    assert Wrong.asked == 5
    assert engine.guesses.passes == 5
    assert engine.guesses.stopped == 1


def test_guesses_that_cost_more_than_they_save_are_off() -> None:
    """A draft that is always right, but takes as long as the model itself, stops; a cheap one doesn't."""
    model, request = writer(), Request([5, 6], Sampling(limit=60))
    for cost, passes in ((1.0, 3), (0.1, 12)):
        guesser = Draft(TorchRunner(model, 1), cost)
        engine = Engine(TorchRunner(model, 1), None, guesser, Speculation(4, trial=3))
        same(engine.submit(request).result(), alone("dense", [request])[0])
        assert engine.guesses.passes == passes


def test_a_guesser_that_fails() -> None:
    class Failing(PromptLookup):
        def guess(self, number: int, text: Written, count: int, chooser: Chooser) -> Guess:
            raise ValueError("no idea")

    engine = Engine(TorchRunner(writer(), 1), None, Failing())
    request = Request([5, 6], Sampling(limit=30))
    same(engine.submit(request).result(), alone("dense", [request])[0])


def improbability(counts: Tensor, chances: Tensor) -> float:
    """Return how probable counts are that differ at least so much from what these chances give (chi-square)."""
    expected = chances * counts.sum()
    seen = expected > 5
    statistic = ((counts - expected)[seen] ** 2 / expected[seen]).sum()
    assert float(counts[chances == 0].sum()) == 0
    return float(torch.special.gammaincc((seen.sum() - 1).double() / 2, statistic.double() / 2))


@pytest.mark.parametrize("drawn", [True, False])
def test_the_distribution_is_the_model_s(drawn: bool) -> None:
    """The first two tokens together, for guesses that are drawn from another distribution, or always the same."""
    vocabulary, draws = 6, 4000
    torch.manual_seed(4)
    first, second = torch.randn(vocabulary) * 1.5, torch.randn(vocabulary, vocabulary) * 1.5
    guess_first, guess_second = torch.randn(vocabulary), torch.randn(vocabulary, vocabulary)
    settings = Sampling(0.8, top_k=5, processors=(MinP(0.05),))
    counts = torch.zeros(vocabulary, vocabulary)
    chooser = Chooser(settings)
    text = Written([0])
    for _ in range(draws):
        a, b = 2, 1
        q = None
        if drawn:
            one = guess_first.softmax(0)
            a = chooser.draw(one)
            two = guess_second[a].softmax(0)
            b = chooser.draw(two)
            q = torch.stack((one, two))
        scores = torch.stack((first, second[a], torch.zeros(vocabulary)))
        found = judge(scores, Guess([a, b], q), text, chooser)
        if len(found) == 1:  # the next pass would choose it
            found.append(chooser.choose(second[found[0]], Written([0], found)))
        counts[found[0], found[1]] += 1
    p = chooser.chances(first, text)
    chances = torch.stack([p[i] * chooser.chances(second[i], Written([0], [i])) for i in range(vocabulary)])
    assert improbability(counts.flatten(), chances.flatten()) > 1e-3


def test_draws_of_the_engine() -> None:
    """The first two tokens of 1,200 answers with a draft that is often wrong, against the model's own chances."""
    model = writer()
    engine = Engine(
        TorchRunner(model, 32), None, Draft(TorchRunner(early_exit(model, 1), 32), 0.1), Speculation(2, 10**6)
    )
    prompt, settings = [5], Sampling(1.0, top_k=3, limit=3)
    handles = [engine.submit(Request(prompt, settings.replace(seed=i))) for i in range(1200)]
    engine.work()
    chooser, found, chances = Chooser(settings), {}, {}
    for handle in handles:
        pair = tuple(handle.result().ids[:2])
        found[pair] = found.get(pair, 0) + 1
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt])).logits
        assert logits is not None
        first = chooser.chances(logits[0, -1], Written(prompt))
        for a in first.nonzero()[:, 0].tolist():
            logits = model(input_ids=torch.tensor([[*prompt, a]])).logits
            assert logits is not None
            second = chooser.chances(logits[0, -1], Written(prompt, [a]))
            chances |= {(a, b): float(first[a] * second[b]) for b in second.nonzero()[:, 0].tolist()}
    pairs = sorted(chances.keys() | found.keys())
    counts, wanted = ([float(table.get(pair, 0)) for pair in pairs] for table in (found, chances))
    assert improbability(torch.tensor(counts), torch.tensor(wanted)) > 1e-3
    assert 0 < engine.guesses.acceptance < 1


def test_looking_up() -> None:
    lookup, chooser = PromptLookup(), Chooser(Sampling())
    assert lookup.guess(0, Written([1, 2, 3, 4, 5, 1, 2, 3]), 2, chooser).ids == [4, 5]
    assert lookup.guess(0, Written([1, 2, 9, 9, 2, 7], [9, 2]), 3, chooser).ids == [7, 9, 2]
    assert lookup.guess(0, Written([1, 2, 3]), 2, chooser).ids == []
    assert lookup.guess(0, Written([1]), 2, chooser).ids == []


def test_an_early_exit_shares_its_tensors() -> None:
    model = writer()
    draft = early_exit(model, 1)
    held = {tensor.data_ptr() for tensor in model.parameters()}
    assert all(tensor.data_ptr() in held for tensor in draft.parameters())
    for blocks in (0, 2, 3):
        with pytest.raises(SpecError, match=f"{blocks} of 2 can't be taken"):
            early_exit(model, blocks)


def test_settings_that_can_not_be() -> None:
    wrong = ({"count": 0}, {"count": 65}, {"trial": 0}, {"least": 0.5})
    for values in wrong:
        with pytest.raises(SpecError, match=next(iter(values))):
            Speculation(**values)  # type: ignore[arg-type]
    with pytest.raises(SpecError, match="at least the last token"):
        PromptLookup(0)
    with pytest.raises(SpecError, match="this one has an encoder"):
        Draft(TorchRunner(writer("encoder-decoder"), 1), 0.1)
