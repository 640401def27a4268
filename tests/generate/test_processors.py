"""Each processor is the reference library's, on random scores, and what it has none for is its formula."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from polyformer.errors import SpecError
from polyformer.generate import (
    BadWords,
    Biased,
    FrequencyPenalty,
    LogitBias,
    MinimumLength,
    MinP,
    NoRepeatNgram,
    PresencePenalty,
    Processor,
    RepetitionPenalty,
    Sampling,
    Suppress,
    SuppressFirst,
    Typical,
    sampling_of,
)
from polyformer.generate.processors import Temperature, TopK, TopP, Written

VOCABULARY = 40
ENDS = (3,)
BAD = ((5,), (3,), (7, 8), (1, 2, 9), (2, 2))
BIASES = {(4,): 1.5, (6,): -2.0, (8, 9): 3.0, (1, 2, 4): -1.0}


def theirs(name: str, *given: Any, **named: Any) -> Any:
    """Make a processor of the reference library."""
    return getattr(pytest.importorskip("transformers"), name)(*given, **named)


def pairs() -> list[tuple[Processor, Any]]:
    """Return our processors and theirs."""
    biases = tuple(Biased(sequence, bias) for sequence, bias in BIASES.items())
    return [
        (LogitBias(biases), theirs("SequenceBiasLogitsProcessor", dict(BIASES))),
        (RepetitionPenalty(1.3), theirs("RepetitionPenaltyLogitsProcessor", 1.3)),
        (NoRepeatNgram(1), theirs("NoRepeatNGramLogitsProcessor", 1)),
        (NoRepeatNgram(2), theirs("NoRepeatNGramLogitsProcessor", 2)),
        (NoRepeatNgram(3), theirs("NoRepeatNGramLogitsProcessor", 3)),
        (BadWords(BAD), theirs("NoBadWordsLogitsProcessor", [list(one) for one in BAD], eos_token_id=3)),
        (MinimumLength(4), theirs("MinNewTokensLengthLogitsProcessor", 3, 4, 3)),
        (Suppress((4, 9)), theirs("SuppressTokensLogitsProcessor", [4, 9])),
        (SuppressFirst((4, 9)), theirs("SuppressTokensAtBeginLogitsProcessor", [4, 9], 3)),
        (Temperature(0.7), theirs("TemperatureLogitsWarper", 0.7)),
        (TopK(5), theirs("TopKLogitsWarper", 5)),
        (TopK(500), theirs("TopKLogitsWarper", 500)),
        (TopP(0.8), theirs("TopPLogitsWarper", 0.8)),
        (TopP(1e-9), theirs("TopPLogitsWarper", 1e-9)),
        (MinP(0.1), theirs("MinPLogitsWarper", 0.1)),
        (Typical(0.6), theirs("TypicalLogitsWarper", 0.6)),
    ]


def texts() -> list[list[int]]:
    """Return texts of few different tokens, so that runs come again; each has a prompt of three."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(1, 10, (3 + length,), generator=generator).tolist() for length in (0, 0, 1, 2, 3, 5, 9, 30)]


def apply(processor: Processor, ids: list[int], scores: Tensor) -> Tensor:
    """Apply ours to a text whose first three tokens are the prompt."""
    kept = scores.clone()
    found = processor.apply(scores, Written(ids[:3], ids[3:], ENDS))
    assert torch.equal(scores, kept), "scores that are given must stay as they are"
    return found


@pytest.mark.parametrize("place", range(16))
def test_as_the_reference_library(place: int) -> None:
    ours, reference = pairs()[place]
    torch.manual_seed(place)
    for ids in texts():
        for scale in (0.1, 1.0, 10.0):
            scores = torch.randn(VOCABULARY) * scale
            assert torch.equal(apply(ours, ids, scores), reference(torch.tensor([ids]), scores[None].clone())[0])


def test_all_together_in_the_reference_s_order() -> None:
    """Given the wrong way round, they are applied in the order in which the library applies them."""
    from transformers import LogitsProcessorList

    listed = pairs()
    chosen = [listed[i] for i in (0, 1, 4, 5, 6, 7, 9, 10, 12, 14, 15)]
    sampling = Sampling(temperature=0.7, top_k=5, top_p=0.8)
    plain = tuple(ours for ours, _ in reversed(chosen) if not isinstance(ours, Temperature | TopK | TopP))
    chain = sampling.replace(processors=plain).chain
    reference = LogitsProcessorList([one for _, one in chosen])
    for ids in texts():
        scores = found = torch.randn(VOCABULARY) * 3
        for one in chain:
            found = apply(one, ids, found)
        assert torch.equal(found, reference(torch.tensor([ids]), scores[None].clone())[0])


def test_penalties_of_what_was_written() -> None:
    scores, text = torch.randn(VOCABULARY), Written([9, 9, 9], [4, 4, 5], ENDS)
    presence = scores - PresencePenalty(0.5).apply(scores, text)
    frequency = scores - FrequencyPenalty(0.5).apply(scores, text)
    for token, (once, each) in {4: (0.5, 1.0), 5: (0.5, 0.5), 9: (0.0, 0.0)}.items():
        assert float(presence[token]) == pytest.approx(once, abs=1e-6)
        assert float(frequency[token]) == pytest.approx(each, abs=1e-6)


def test_what_only_shapes_a_draw_is_left_out_where_nothing_is_drawn() -> None:
    cuts = (Typical(0.5), MinP(0.1), Suppress((4,)))
    assert Sampling(top_k=3, top_p=0.5, processors=cuts).chain == (Suppress((4,)),)
    assert len(Sampling(1.0, 3, 0.5, processors=cuts).chain) == 5


def test_settings_by_the_ecosystem_s_names() -> None:
    found = sampling_of(
        {"temperature": 0.5, "min_p": 0.1, "logit_bias": {"4": -5}, "bad_words_ids": [[1, 2]], "stop": ["a"]}
    )
    wanted = (MinP(0.1), LogitBias((Biased((4,), -5.0),)), BadWords(((1, 2),)))
    assert found == Sampling(0.5, processors=wanted, stop=("a",))


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"min_q": 0.1}, r"no 'min_q' \(did you mean 'min_p'\?\)"),
        ({"min_p": 2}, "min_p must be between 0 and 1"),
        ({"min_p": float("nan")}, "share should be a number"),
        ({"typical_p": 0}, "typical_p must be in"),
        ({"repetition_penalty": 0}, "must be more than 0"),
        ({"repetition_penalty": -1}, "must be more than 0"),
        ({"no_repeat_ngram_size": 0}, "must be at least 1"),
        ({"logit_bias": [1]}, "logit_bias should be a table"),
        ({"logit_bias": {"the": 1}}, "logit_bias should be a table"),
        ({"bad_words_ids": [[]]}, "needs at least one token"),
        ({"min_new_tokens": -1}, "can't be negative"),
        ({"stop": [""]}, "an empty text can't stop"),
        ({"temperature": "hot"}, "temperature"),
        ({"presence_penalty": 1e9}, "presence penalty must be a finite number"),
        ({"frequency_penalty": -1e9}, "frequency penalty must be a finite number"),
        ({"logit_bias": {"4": 1e31}}, "bias must be a finite number"),
    ],
)
def test_settings_that_can_not_be(asked: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        sampling_of(asked)
