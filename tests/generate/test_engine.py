"""The engine: every answer is the one that its request gets alone, whatever else is asked, and nothing is lost."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from polyformer.errors import RunError, SpecError
from polyformer.generate import (
    Answer,
    Biased,
    Capacity,
    Engine,
    LogitBias,
    Request,
    Rows,
    Sampling,
    Suppress,
    TorchRunner,
    runner_of,
)
from polyformer.generate.processors import Processor, Written
from tests.generate.writers import KINDS, VOCABULARY, ids, requests, writer

SHORT = Request([5, 6, 7], Sampling(limit=4))


def alone(kind: str, asked: Sequence[Request]) -> list[Answer]:
    """Answer requests one after the other, each by an engine of its own."""
    model = writer(kind)
    return [Engine(runner_of(model, 1)).submit(one).result() for one in asked]


def same(found: Answer, wanted: Answer) -> None:
    """Compare answers, whose sums may be rounded in another order."""
    assert found.ids == wanted.ids
    assert found.reason == wanted.reason
    assert math.isclose(found.log_probability, wanted.log_probability, abs_tol=1e-8)


def slowly(kind: str, request: Request) -> list[int]:
    """Write the likeliest tokens with the whole text read anew for each."""
    model, text = writer(kind), list(request.prompt)
    for _ in range(request.settings.limit):
        given: dict[str, Tensor] = {"input_ids": torch.tensor([text])}
        if request.source is not None:
            given = {"input_ids": torch.tensor([list(request.source)]), "decoder_input_ids": torch.tensor([text])}
        with torch.no_grad():
            logits = model(**given).logits
        assert logits is not None
        text.append(int(logits[0, -1].argmax()))
        if text[-1] in request.ends:
            return text[len(request.prompt) : -1]
    return text[len(request.prompt) :]


@pytest.mark.parametrize("kind", KINDS)
def test_alone_is_the_plain_model(kind: str) -> None:
    for request in requests(kind, 4):
        request = Request(request.prompt, Sampling(limit=9), request.ends, request.source)
        (found,) = alone(kind, [request])
        assert found.ids == slowly(kind, request)


@pytest.mark.parametrize("kind", KINDS[:4])
def test_64_at_once(kind: str) -> None:
    """With pieces of prompts, fewer slots than requests, and so little memory that texts have to give way."""
    asked = requests(kind, 64)
    wanted = alone(kind, asked)
    runner = runner_of(writer(kind), 12)
    memory = (
        5 * max(runner.bytes_for(len(one.prompt) + one.settings.limit, len(one.source or ())) for one in asked) // 2
    )
    engine = Engine(runner, Capacity(memory=memory, rows=24))
    handles = [engine.submit(one) for one in asked]
    while engine.step():
        assert engine.bytes <= memory
    for handle, answer in zip(handles, wanted, strict=True):
        same(handle.result(), answer)
    assert engine.bytes == 0
    assert engine.counts.written == sum(len(one.tokens) + (one.reason == "end") for one in wanted)


@pytest.mark.parametrize("kind", KINDS[:4])
def test_texts_that_give_way_are_not_lost(kind: str) -> None:
    """All are let in while they are short; as they grow, only some have room."""
    first = requests(kind, 4)
    asked = [Request(one.prompt[:3], Sampling(1.0, limit=80, seed=i), (), one.source) for i, one in enumerate(first)]
    wanted = alone(kind, asked)
    runner = runner_of(writer(kind), 4)
    memory = max(runner.bytes_for(83, len(one.source or ())) for one in asked) * 2
    engine = Engine(runner, Capacity(memory=memory))
    handles = [engine.submit(one) for one in asked]
    engine.work()
    if kind != "recurrent":  # whose memory doesn't grow
        assert engine.counts.preempted > 0
    for handle, answer in zip(handles, wanted, strict=True):
        same(handle.result(), answer)
    assert engine.bytes == 0


@pytest.mark.parametrize("kind", KINDS[:4])
def test_a_beginning_is_used_again(kind: str) -> None:
    """A conversation goes on: its text so far isn't computed anew, and the answers are the same."""
    first = requests(kind, 1)[0]
    first = Request(first.prompt, Sampling(limit=30), (), first.source)
    engine = Engine(runner_of(writer(kind), 4), Capacity(kept=2))
    said = engine.submit(first).result()
    more = Request([*first.prompt, *said.ids, 9, 8], Sampling(limit=5), (), first.source)
    found = engine.submit(more).result()
    assert found.reused == len(first.prompt) + len(said.ids) - 1
    same(found, alone(kind, [more])[0])
    other = Request([*first.prompt, *said.ids[:20], 7], Sampling(limit=5), (), first.source)
    branch = engine.submit(other).result()
    assert branch.reused == (0 if kind == "recurrent" else len(first.prompt) + 20)
    same(branch, alone(kind, [other])[0])
    assert engine.bytes > 0
    engine.forget()
    assert engine.bytes == 0


def test_beginnings_of_texts_that_are_still_written() -> None:
    prompt = ids(40, 1)
    engine = Engine(TorchRunner(writer(), 4))
    first = engine.submit(Request(prompt, Sampling(limit=20)))
    engine.step()
    second = engine.submit(Request([*prompt, 5], Sampling(limit=5)))
    third = engine.submit(Request([*prompt, 6], Sampling(limit=5, temperature=1.0)))
    engine.work()
    assert second.result().reused == third.result().reused == 40
    asked = [one._job.request for one in (first, second, third)]
    for handle, answer in zip((first, second, third), alone("dense", asked), strict=True):
        same(handle.result(), answer)


def test_other_weights_make_the_cache_worthless() -> None:
    runner = TorchRunner(writer(), 4)
    engine, prompt = Engine(runner, Capacity(kept=2)), ids(40, 1)
    engine.submit(Request(prompt, Sampling(limit=2))).result()
    runner.version = "another"
    assert engine.submit(Request(prompt, Sampling(limit=2))).result().reused == 0


def test_another_source_makes_the_cache_worthless() -> None:
    engine = Engine(TorchRunner(writer("encoder-decoder"), 4), Capacity(kept=2))
    prompt = ids(30, 1)
    engine.submit(Request(prompt, Sampling(limit=2), source=[5, 6])).result()
    assert engine.submit(Request(prompt, Sampling(limit=2), source=[5, 7])).result().reused == 0
    assert engine.submit(Request(prompt, Sampling(limit=2), source=[5, 6])).result().reused == 29


def test_cancelled_a_thousand_times() -> None:
    engine = Engine(TorchRunner(writer(), 4))
    for i in range(1000):
        handle = engine.submit(Request([5, 6, 1 + i % 9], Sampling(limit=40)))
        for _ in range(i % 3):
            engine.step()
        handle.cancel()
        engine.step()
        assert handle.result().reason == "cancelled"
        assert len(handle.result().ids) == i % 3
    assert engine.bytes == 0
    assert engine.submit(SHORT).result().ids == alone("dense", [SHORT])[0].ids


def test_cancelled_while_it_waits_and_after_the_end() -> None:
    engine = Engine(TorchRunner(writer(), 1))
    first, second = engine.submit(SHORT), engine.submit(SHORT)
    engine.step()
    second.cancel()
    assert second.result().reason == "cancelled"
    answer = first.result()
    first.cancel()
    engine.step()
    assert first.result() == answer
    assert answer.reason == "limit"


def test_a_deadline() -> None:
    engine = Engine(TorchRunner(writer(), 1))
    handle = engine.submit(Request([5], Sampling(limit=10**9), seconds=0.05))
    begun = time.monotonic()
    assert handle.result().reason == "deadline"
    assert time.monotonic() - begun < 10
    assert handle.result().ids
    assert engine.bytes == 0


class Broken(Processor):
    """Fails at the third token."""

    def apply(self, scores: Tensor, text: Written) -> Tensor:
        if len(text.ids) == 2:
            raise ZeroDivisionError("broken")
        return scores


class Poisoned(TorchRunner):
    """A model that fails on one token and gives no numbers for another."""

    def step(self, rows: Rows, wanted: Sequence[int]) -> Tensor:
        if 1 in rows.ids:
            raise ValueError("token 1 is poison")
        scores = super().step(rows, wanted).clone()
        scores[[rows.ids[i] == 2 for i in wanted]] = math.nan
        return scores


@pytest.mark.parametrize("kind", ["dense", "recurrent"])
def test_one_bad_request_fails_alone(kind: str) -> None:
    """Whether the model, its scores or a processor is to blame."""
    model = writer(kind)
    never = Suppress((1, 2))  # so that good ones don't write poison
    good = [Request(ids(5, i), Sampling(limit=8, processors=(never,))) for i in range(4)]
    wanted = [Engine(runner_of(model, 1)).submit(one).result() for one in good]
    engine = Engine(Poisoned(model, 8))
    bad = {
        "token 1 is poison": Request([4, 1], Sampling(limit=8)),
        "scores that are no numbers": Request([4, 2], Sampling(limit=8)),
        "ZeroDivisionError: broken": Request([4, 5], Sampling(limit=8, processors=(Broken(), never))),
        "every token is forbidden": Request([4], Sampling(processors=(Suppress(tuple(range(VOCABULARY))),))),
        "or a processor made": Request([4], Sampling(1.0, processors=(Suppress(tuple(range(VOCABULARY))),))),
    }
    handles = [engine.submit(one) for one in good]
    failing = [engine.submit(one) for one in bad.values()]
    for handle, message in zip(failing, bad, strict=True):
        with pytest.raises(RunError, match=message):
            handle.result()
        with pytest.raises(RunError, match=message):
            list(handle)
    for handle, answer in zip(handles, wanted, strict=True):
        same(handle.result(), answer)
    assert engine.bytes == 0


def test_an_encoder_that_fails() -> None:
    class Deaf(TorchRunner):
        def read(self, sources: Mapping[int, Sequence[int]]) -> None:
            if any(9 in source for source in sources.values()):
                raise ValueError("can't hear")
            super().read(sources)

    engine = Engine(Deaf(writer("encoder-decoder"), 4))
    good, bad = (engine.submit(Request([1], Sampling(limit=3), source=[5, last])) for last in (8, 9))
    assert len(good.result().ids) == 3
    with pytest.raises(RunError, match="can't hear"):
        bad.result()
    assert engine.bytes == 0


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request([]), "at least one token"),
        (Request([VOCABULARY]), "outside of the vocabulary of 31"),
        (Request([4] * 70), "a prompt of 70 tokens is longer than the model's 64 positions"),
        (Request([4], source=[4]), "has no encoder that reads a source"),
        (Request([4], Sampling(stop=("a",))), "stop strings need a decoder"),
        (Request([4], seconds=0), "within 0 seconds"),
        (Request([4], seconds=math.nan), "within nan seconds"),
        (Request([4], Sampling(processors=(Suppress((31,)),))), "Suppress names token 31"),
        (Request([4], Sampling(processors=(LogitBias((Biased((4, -1), 1.0),)),))), "LogitBias names token -1"),
    ],
)
def test_requests_that_can_not_be(request_: Request, message: str) -> None:
    engine = Engine(TorchRunner(writer("learned"), 1))
    with pytest.raises(SpecError, match=message):
        engine.submit(request_)
    assert not engine.step()
    assert len(engine.submit(SHORT).result().ids) == 4


def test_sources_that_can_not_be() -> None:
    engine = Engine(TorchRunner(writer("encoder-decoder"), 1))
    for source, message in ((None, "needs a source"), ([], "at least one token"), ([99], "outside of the vocabulary")):
        with pytest.raises(SpecError, match=message):
            engine.submit(Request([1], source=source))


def test_too_little_memory_for_one() -> None:
    runner = TorchRunner(writer(), 2)
    engine = Engine(runner, Capacity(memory=runner.bytes_for(64)))
    with pytest.raises(SpecError, match=r"3 tokens with up to 1000000000 more takes .* bytes of cache, but there are"):
        engine.submit(Request([4, 5, 6], Sampling(limit=10**9)))
    assert len(engine.submit(Request([4, 5, 6], Sampling(limit=62))).result().ids) == 62
    assert engine.bytes == 0


def test_a_billion_tokens_are_as_many_as_there_are_positions() -> None:
    engine = Engine(TorchRunner(writer(), 2, positions=20))
    assert len(engine.submit(Request([4, 5, 6], Sampling(limit=10**9))).result().ids) == 18


def test_the_queue_is_bounded() -> None:
    engine = Engine(TorchRunner(writer(), 1), Capacity(waiting=3))
    handles = [engine.submit(SHORT) for _ in range(3)]
    with pytest.raises(RunError, match="3 requests wait already"):
        engine.submit(SHORT)
    assert {tuple(handle.result().ids) for handle in handles} == {tuple(alone("dense", [SHORT])[0].ids)}


@pytest.mark.parametrize("values", [{"memory": 0}, {"rows": 0}, {"waiting": 0}, {"kept": -1}])
def test_capacities_that_can_not_be(values: dict[str, Any]) -> None:
    with pytest.raises(SpecError, match=next(iter(values))):
        Capacity(**values)


def test_users_share_evenly() -> None:
    """One asks for much at once, another for one thing later: it needn't wait for all of the first one's."""
    engine = Engine(TorchRunner(writer(), 1))
    many = [engine.submit(Request(ids(9, i), Sampling(limit=5), user="many")) for i in range(10)]
    many[0].result()
    one = engine.submit(Request(ids(9, 50), Sampling(limit=5), user="one"))
    one.result()
    assert sum(handle.done for handle in many) <= 2
    engine.work()
    assert all(handle.done for handle in many)


def test_many_threads() -> None:
    """Some submit and read, some cancel; every answer is the one that it would be alone."""
    asked = requests("dense", 24)
    wanted = alone("dense", asked)
    engine = Engine(TorchRunner(writer(), 6), Capacity(rows=16))
    found: dict[int, list[int]] = {}

    def ask(i: int) -> None:
        handle = engine.submit(asked[i])
        found[i] = [token.id for delta in handle for token in delta.tokens]

    def disturb() -> None:
        for _ in range(20):
            handle = engine.submit(SHORT)
            engine.step()
            handle.cancel()

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(24)] + [threading.Thread(target=disturb)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found == {i: answer.ids for i, answer in enumerate(wanted)}
    engine.work()
    assert engine.bytes == 0


def test_log_probabilities_of_the_likeliest() -> None:
    (answer,) = alone("dense", [Request([5, 6], Sampling(0.7, limit=5, shown=3))])
    with torch.no_grad():
        logits = writer()(input_ids=torch.tensor([[5, 6, *answer.ids]])).logits
    assert logits is not None
    likely = logits[0].log_softmax(-1)[1:-1]
    for row, token in zip(likely, answer.tokens, strict=True):
        values, best = row.topk(3)
        assert [one for one, _ in token.likeliest] == best.tolist()
        assert [value for _, value in token.likeliest] == pytest.approx(values.tolist())
        assert token.log_probability == pytest.approx(float(row[token.id]))


def test_an_interrupt_leaves_the_engine_as_it_was() -> None:
    class Interrupted(TorchRunner):
        calls = 0

        def _run(self, *given: Any) -> Tensor:
            scores = super()._run(*given)
            Interrupted.calls += 1
            if Interrupted.calls % 3 == 0:
                raise KeyboardInterrupt
            return scores

    for kind in ("dense", "recurrent"):
        request = Request(ids(5, 1), Sampling(limit=12))
        handle = Engine(Interrupted(writer(kind), 1)).submit(request)
        while not handle.done:
            try:
                handle.result()
            except KeyboardInterrupt:
                continue
        same(handle.result(), alone(kind, [request])[0])


def test_an_interrupt_while_a_source_is_read() -> None:
    class Interrupted(TorchRunner):
        calls = 0

        def read(self, sources: Mapping[int, Sequence[int]]) -> None:
            Interrupted.calls += 1
            if Interrupted.calls == 1:
                raise KeyboardInterrupt
            super().read(sources)

    request = Request([1], Sampling(limit=4), source=[5, 6])
    handle = Engine(Interrupted(writer("encoder-decoder"), 1)).submit(request)
    with pytest.raises(KeyboardInterrupt):
        handle.result()
    same(handle.result(), alone("encoder-decoder", [request])[0])
