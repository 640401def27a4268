"""Search held against a plain one without cache and batch, against exhaustion, and against itself in other company."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from polyformer.errors import RunError, SpecError
from polyformer.generate import Diverse, Gnmt, Hypothesis, Limit, Power, Safe, Search, forests, search
from polyformer.parts.model import TransformerPart
from tests.generate.models import BOS, EOS, PAD, SPECIAL, UNK, sentences, tiny
from tests.generate.reference import beam_search, log_probabilities

PENALTIES = [Gnmt(0.6), Gnmt(0.0), Power(1.0), Power(0.3), Power(-0.5)]


def found(model: TransformerPart, lengths: list[int], settings: Search) -> list[list[Hypothesis]]:
    ids, mask = sentences(lengths)
    return search(model, ids, mask, settings, SPECIAL)


def same(ours: list[Hypothesis], others: list[Hypothesis]) -> bool:
    return [h.ids for h in ours] == [h.ids for h in others] and [h.score for h in ours] == pytest.approx(
        [h.score for h in others], abs=1e-5
    )


@pytest.mark.parametrize("penalty", PENALTIES, ids=str)
@pytest.mark.parametrize("beams", [1, 2, 4, 7])
def test_equals_a_search_without_cache_batch_and_stopping(beams: int, penalty: Any) -> None:
    model = tiny(seed=beams, ending=0.5)
    settings = Search(beams=beams, nbest=min(3, beams), penalty=penalty, limit=Limit(7), forbidden=(UNK,))
    lengths = [5, 2, 9]
    ids, _ = sentences(lengths)
    for row, hypotheses in enumerate(found(model, lengths, settings)):
        with torch.no_grad():
            plain = beam_search(model, ids[row, : lengths[row]], settings)
        if beams == 1:  # greedy search ends where the end token comes first
            assert len(hypotheses) == 1
        assert [h.ids for h in hypotheses] == [ids for _, ids in plain][: len(hypotheses)]
        assert [h.score for h in hypotheses] == pytest.approx([score for score, _ in plain], abs=1e-5)


@pytest.mark.parametrize("seed", range(6))
def test_one_beam_is_greedy(seed: int) -> None:
    model = tiny(seed, ending=0.3)
    lengths = [3, 8, 5, 1]
    ids, _ = sentences(lengths)
    for row, (hypothesis,) in enumerate(found(model, lengths, Search(beams=1, limit=Limit(12), forbidden=(UNK,)))):
        written: list[int] = []
        while len(written) < 12:
            with torch.no_grad():
                following = torch.tensor(log_probabilities(model, ids[row, : lengths[row]], written))
            following[[SPECIAL.bos, SPECIAL.pad, UNK]] = -math.inf
            if int(following.argmax()) == EOS:
                break
            written.append(int(following.argmax()))
        assert hypothesis.ids == written


@pytest.mark.parametrize("penalty", PENALTIES, ids=str)
def test_with_enough_beams_the_n_best_of_all_sequences_are_found(penalty: Any) -> None:
    model = tiny(seed=3, vocabulary=7, ending=-0.5)
    ids, mask = sentences([4], vocabulary=7)
    writable, limit = [3, 4, 5, 6], 3
    endings = [list(s) for n in range(limit) for s in itertools.product(writable, repeat=n)]
    cut = [list(s) for s in itertools.product(writable, repeat=limit)]
    scored = []
    with torch.no_grad():
        for sequence in endings + cut:
            tokens = [*sequence, EOS] if len(sequence) < limit else sequence
            total = sum(log_probabilities(model, ids[0], tokens[:i])[token] for i, token in enumerate(tokens))
            scored.append((total / penalty.divisor(len(tokens)), sequence))
    scored.sort(reverse=True)
    settings = Search(beams=100, nbest=20, penalty=penalty, limit=Limit(limit))
    best = search(model, ids, mask, settings, SPECIAL)[0]
    assert [h.ids for h in best] == [sequence for _, sequence in scored[:20]]
    assert [h.score for h in best] == pytest.approx([score for score, _ in scored[:20]], abs=1e-5)


@given(
    st.integers(0, 10_000),
    st.integers(1, 5),
    st.integers(1, 5),
    st.sampled_from(PENALTIES),
    st.floats(-2, 4),
    st.integers(1, 20),
)
def test_early_stopping_never_changes_the_answer(
    seed: int, beams: int, nbest: int, penalty: Any, ending: float, tokens: int
) -> None:
    model = tiny(seed, ending=ending, layers=1).double()
    settings = Search(beams=beams, nbest=min(beams, nbest), penalty=penalty, limit=Limit(tokens, 1.5, 2))
    stopped = found(model, [6, 3, 1], settings)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Safe, "divisor", lambda *_: math.inf)  # whatever lives could still reach 0
        patch.setattr(Safe, "kept", lambda self, beams, nbest: 10_000)
        whole = found(model, [6, 3, 1], settings)
    assert all(same(a, b) for a, b in zip(stopped, whole, strict=True))


def test_early_stopping_saves_steps() -> None:
    model = tiny(seed=1, ending=4.0)
    rows = decoded_rows(model, Search(limit=Limit(50)))
    assert 1 < len(rows) < 20


def decoded_rows(model: TransformerPart, settings: Search) -> list[int]:
    """Return how many rows each step of a search for four sentences decodes."""
    rows: list[int] = []
    decode = model.decode

    def counting(ids: torch.Tensor, *rest: Any, **named: Any) -> torch.Tensor:
        rows.append(len(ids))
        return decode(ids, *rest, **named)

    model.decode = counting  # type: ignore[method-assign]
    try:
        found(model, [7, 2, 4, 5], settings)
    finally:
        del model.decode
    return rows


def test_sentences_that_are_done_leave_the_batch() -> None:
    model = tiny(seed=1)
    rows = decoded_rows(model, Search(beams=3, limit=Limit(40, 2.0, 0), penalty=Power(5.0)))
    assert rows[:2] == [4, 12]  # one row to a sentence at first, for all hypotheses are the same
    assert rows[4:] == [9] * 4 + [6] * 2 + [3] * 4  # the limits are 4, 8, 10 and 14 tokens


@given(st.integers(0, 10_000), st.integers(1, 4), st.lists(st.integers(1, 9), min_size=2, max_size=5))
def test_a_batch_equals_one_by_one(seed: int, beams: int, lengths: list[int]) -> None:
    model = tiny(seed, ending=0.5, layers=1).double()  # only rounding could make two hypotheses equally good
    settings = Search(beams=beams, nbest=beams, limit=Limit(10, 2.0, 1))
    ids, mask = sentences(lengths, seed=seed)
    together = search(model, ids, mask, settings, SPECIAL)
    for row, length in enumerate(lengths):
        alone = search(model, ids[row : row + 1, :length], None, settings, SPECIAL)[0]
        assert same(together[row], alone)


def test_left_padding_equals_right_padding() -> None:
    model = tiny(seed=5)
    ids, mask = sentences([6, 3])
    left_ids, left_mask = ids.clone(), mask.clone()
    left_ids[1], left_mask[1] = ids[1].roll(3), mask[1].roll(3)
    right, left = (search(model, *both, Search(nbest=4), SPECIAL) for both in ((ids, mask), (left_ids, left_mask)))
    assert all(same(a, b) for a, b in zip(right, left, strict=True))


def test_n_best_are_sorted_distinct_and_never_hold_control_tokens() -> None:
    model = tiny(seed=2, ending=1.0)
    for hypotheses in found(model, [4, 7], Search(beams=6, nbest=6, forbidden=(UNK, 7))):
        assert len(hypotheses) == 6
        assert sorted(hypotheses, key=lambda h: -h.score) == hypotheses
        assert len({tuple(h.ids) for h in hypotheses}) == 6
        assert not {SPECIAL.pad, SPECIAL.bos, EOS, UNK, 7} & {i for h in hypotheses for i in h.ids}


def test_scores_are_the_models_log_probabilities_over_the_penalty() -> None:
    model = tiny(seed=2, ending=1.0)
    ids, mask = sentences([5])
    for hypothesis in search(model, ids, mask, Search(nbest=4, penalty=Gnmt(0.8)), SPECIAL)[0]:
        cut = len(hypothesis.ids) == Search().limit.of(5)
        tokens = hypothesis.ids if cut else [*hypothesis.ids, EOS]
        with torch.no_grad():
            total = sum(log_probabilities(model, ids[0], tokens[:i])[token] for i, token in enumerate(tokens))
        assert hypothesis.log_probability == pytest.approx(total, abs=1e-5)
        assert hypothesis.score == pytest.approx(total / ((5 + len(tokens)) / 6) ** 0.8, abs=1e-5)


def test_a_hypothesis_that_does_not_end_is_cut_or_ended() -> None:
    model = tiny(seed=2, ending=-50.0)
    cut = found(model, [5], Search(limit=Limit(4)))[0][0]
    ended = found(model, [5], Search(limit=Limit(5, unfinished="end")))[0][0]
    assert cut.ids == ended.ids
    assert cut.log_probability == pytest.approx(ended.log_probability, abs=1e-6)
    assert cut.score / ended.score == pytest.approx(Gnmt().divisor(5) / Gnmt().divisor(4))
    assert found(model, [5], Search(limit=Limit(1, unfinished="end")))[0] == [Hypothesis([], 0.0, 0.0)]


def test_the_decoders_positions_limit_the_output() -> None:
    model = tiny(seed=2, ending=-50.0, positions=6)
    assert len(found(model, [5], Search(limit=Limit(100)))[0][0].ids) == 6


def test_long_outputs_outgrow_the_first_room(monkeypatch: pytest.MonkeyPatch) -> None:
    model, settings = tiny(seed=2, ending=-1.0), Search(limit=Limit(90), penalty=Power(1.0))
    expected = found(model, [5, 3], settings)
    assert max(len(one[0].ids) for one in expected) > 64
    monkeypatch.setattr(forests, "FIRST_ROOM", 90)
    assert found(model, [5, 3], settings) == expected


def test_equally_good_tokens_are_taken_by_their_ids() -> None:
    model = tiny(vocabulary=400)
    with torch.no_grad():
        model.head.projection.weight.zero_()  # type: ignore[union-attr, operator]
    hypotheses = found(model, [3, 5], Search(beams=3, nbest=3, limit=Limit(2), penalty=Power(0.0)))
    assert [h.ids for h in hypotheses[0]] == [[], [3], [3, 3]]  # eos is 2, and hypothesis [3] comes before [4]
    assert hypotheses[0] == hypotheses[1]


def test_damaged_weights_are_reported() -> None:
    model = tiny()
    with torch.no_grad():
        model.head.projection.weight[5, 2] = math.nan  # type: ignore[union-attr, index]
    with pytest.raises(RunError, match="no numbers"):
        found(model, [3, 4], Search())


def test_a_token_beyond_the_vocabulary_is_refused() -> None:
    with pytest.raises(SpecError, match="no token 13 in a vocabulary of 13"):
        found(tiny(), [3], Search(forbidden=(13,)))


def test_a_model_that_can_not_write_is_refused() -> None:
    model = tiny()
    model.head = None
    with pytest.raises(SpecError, match="head"):
        found(model, [3], Search())


def test_training_mode_is_put_back_and_the_model_still_trains() -> None:
    model = tiny().train()
    ids, mask = sentences([9, 4])
    search(model, ids, mask, Search(limit=Limit(70)), SPECIAL)
    assert model.training
    logits = model(ids, mask, ids).logits
    assert logits is not None
    logits.sum().backward()


def plainly_diverse(model: TransformerPart, source: Tensor, settings: Search) -> list[list[int]]:
    """Diverse beam search (Vijayakumar et al. 2018, algorithm 1) of one sentence, with everything computed anew."""
    assert settings.diverse is not None
    width, limit = settings.beams // settings.diverse.groups, settings.limit.of(len(source))
    live: list[list[tuple[float, list[int]]]] = [[(0.0, [])] for _ in range(settings.diverse.groups)]
    finished: list[tuple[float, list[int]]] = []
    for length in range(1, limit + 1):
        taken: list[int] = []
        for group, hypotheses in enumerate(live):
            following = [
                (total + more - settings.diverse.strength * taken.count(token), [*ids, token])
                for total, ids in hypotheses
                for token, more in enumerate(log_probabilities(model, source, ids))
                if token not in (PAD, BOS)
            ]
            following = sorted(following, key=lambda one: -one[0])[: 2 * width if width > 1 else 1]
            for total, ids in following[:width]:
                if ids[-1] == EOS or length == limit:
                    finished.append((total / settings.penalty.divisor(length), ids[:-1] if ids[-1] == EOS else ids))
            live[group] = [one for one in following if one[1][-1] != EOS][:width] if length < limit else []
            taken += [ids[-1] for _, ids in live[group]]
    return [ids for _, ids in sorted(finished, key=lambda one: -one[0])[: settings.nbest]]


@pytest.mark.parametrize("strength", [0.0, 0.7, 5.0])
def test_diverse_groups(strength: float) -> None:
    """Hypotheses never end here, so that when a group stops can't matter."""
    model = tiny(seed=2, ending=-50.0)
    ids, mask = sentences([5, 3, 6])
    settings = Search(4, 4, Power(0.0), Limit(5), diverse=Diverse(2, strength))
    groups = search(model, ids, mask, settings, SPECIAL)
    for row, real, hypotheses in zip(ids, mask, groups, strict=True):
        with torch.no_grad():
            assert [one.ids for one in hypotheses] == plainly_diverse(model, row[real], settings)
    if strength == 5.0:
        assert all(len({one.ids[0] for one in hypotheses}) > 1 for hypotheses in groups)


def test_diverse_groups_stop_when_all_are_done() -> None:
    model = tiny(seed=2, ending=2.0)
    ids, mask = sentences([5, 3, 6])
    settings = Search(6, 6, Power(0.0), Limit(9), diverse=Diverse(3, 1.0))
    for hypotheses in search(model, ids, mask, settings, SPECIAL):
        assert 0 < len(hypotheses) <= 6
        assert [one.score for one in hypotheses] == sorted((one.score for one in hypotheses), reverse=True)
