"""Token for token what Hugging Face's generate finds for a Marian model of the same weights."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.translation import Sizes, copying_marian
from polyformer.generate import (
    BadWords,
    Biased,
    Early,
    Hopeful,
    Hypothesis,
    Limit,
    LogitBias,
    MinimumLength,
    NoRepeatNgram,
    Power,
    Processor,
    RepetitionPenalty,
    Safe,
    Search,
    SpecialTokens,
    SuppressFirst,
    search,
)
from polyformer.loaded import load
from polyformer.parts.model import TransformerPart

transformers = pytest.importorskip("transformers")

SIZES = Sizes(width=32, layers=2, hidden=64, heads=4, vocabulary=60, spread=0.25)
PAD = SIZES.pad
MARIAN = SpecialTokens(bos=PAD, eos=0, pad=PAD)


@pytest.fixture(scope="module", params=[0, 1])
def both(request: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, TransformerPart]:
    """A small Marian model there and here, which copies its source after a fashion."""
    theirs = copying_marian(SIZES, seed=request.param)
    folder: Path = tmp_path_factory.mktemp("marian")
    theirs.save_pretrained(folder)
    return theirs, load(folder).model


def sources() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    ids = torch.full((9, 10), PAD)
    for row, length in enumerate([10, 3, 7, 1, 5, 10, 2, 8, 4]):
        ids[row, :length] = torch.randint(1, PAD, (length,), generator=generator)
        ids[row, length - 1] = 0
    return ids, ids != PAD


def theirs_found(model: Any, settings: Search) -> list[list[tuple[list[int], float]]]:
    ids, mask = sources()
    out = model.generate(
        input_ids=ids,
        attention_mask=mask.long(),
        num_beams=settings.beams,
        num_return_sequences=settings.nbest,
        max_new_tokens=settings.limit.tokens,
        length_penalty=settings.penalty.alpha,
        early_stopping={Hopeful(): False, Safe(): "never", Early(): True}[settings.stop],
        forced_eos_token_id=0 if settings.limit.unfinished == "end" else None,
        bad_words_ids=[[PAD]],
        return_dict_in_generate=True,
        output_scores=True,
    )
    rows = [[i for i in row[1:] if i != PAD] for row in out.sequences.tolist()]
    cleaned = [row[:-1] if row and row[-1] == 0 else row for row in rows]
    scored = list(zip(cleaned, out.sequences_scores.tolist(), strict=True))
    return [scored[i : i + settings.nbest] for i in range(0, len(scored), settings.nbest)]


SETTINGS = [
    Search(beams, nbest, Power(alpha), Limit(tokens, unfinished=unfinished), stop)  # type: ignore[arg-type]
    for beams, nbest, alpha, tokens, unfinished, stop in itertools.product(
        (2, 4), (1, 2), (0.0, 0.6, 1.0, -0.5), (5, 16), ("cut", "end"), (Safe(), Hopeful(), Early())
    )
]


@pytest.mark.parametrize("group", range(8))
def test_n_best_are_the_same(both: tuple[Any, TransformerPart], group: int) -> None:
    theirs, ours = both
    for settings in SETTINGS[group::8]:
        found: list[list[Hypothesis]] = search(ours, *sources(), settings, MARIAN)
        expected = theirs_found(theirs, settings)
        assert [[h.ids for h in one] for one in found] == [[ids for ids, _ in one] for one in expected], settings
        for one, other in zip(found, expected, strict=True):
            assert [h.score for h in one] == pytest.approx([score for _, score in other], abs=1e-4)


CHANGED: list[tuple[Processor, dict[str, Any]]] = [
    (NoRepeatNgram(2), {"no_repeat_ngram_size": 2}),
    (MinimumLength(7), {"min_length": 8}),  # the start token counts there
    (RepetitionPenalty(1.4), {"repetition_penalty": 1.4}),
    (BadWords(((5, 6), (8, 8), (9,))), {"bad_words_ids": [[PAD], [5, 6], [8, 8], [9]]}),
    (SuppressFirst((1, 2, 3, 4)), {"begin_suppress_tokens": [1, 2, 3, 4]}),
    (LogitBias((Biased((7,), -2.0),)), {"sequence_bias": {(7,): -2.0}}),
]


@pytest.mark.parametrize("beams", [1, 4])
def test_processors_in_a_search(both: tuple[Any, TransformerPart], beams: int) -> None:
    """Alone and all together, with one hypothesis and with several."""
    theirs, ours = both
    ids, mask = sources()
    every = {key: value for _, asked in CHANGED for key, value in asked.items()}
    cases = [((processor,), asked) for processor, asked in CHANGED]
    for processors, asked in [*cases, (tuple(one for one, _ in CHANGED), every)]:
        named: dict[str, Any] = {"bad_words_ids": [[PAD]], "num_beams": beams, "max_new_tokens": 12, **asked}
        if beams > 1:
            named |= {"early_stopping": "never", "length_penalty": 0.6}
        out = theirs.generate(input_ids=ids, attention_mask=mask.long(), **named)
        settings = Search(beams, 1, Power(0.6), Limit(12, unfinished="end"), processors=processors)
        found = [one[0].ids for one in search(ours, ids, mask, settings, MARIAN)]
        assert found == [[i for i in row[1:] if i not in (0, PAD)] for row in out.tolist()], processors


def test_the_comparison_is_of_outputs_that_differ(both: tuple[Any, TransformerPart]) -> None:
    found = search(both[1], *sources(), Search(4, 2, Power(1.0), Limit(16)), MARIAN)
    assert len({tuple(h.ids) for one in found for h in one}) > 9
    assert len({len(h.ids) for one in found for h in one}) > 3


def test_greedy_is_the_same(both: tuple[Any, TransformerPart]) -> None:
    theirs, ours = both
    ids, mask = sources()
    out = theirs.generate(
        input_ids=ids, attention_mask=mask.long(), num_beams=1, max_new_tokens=12, bad_words_ids=[[PAD]]
    )
    found = search(ours, ids, mask, Search(1, limit=Limit(12, unfinished="end")), MARIAN)
    assert [one[0].ids for one in found] == [[i for i in row[1:] if i not in (0, PAD)] for row in out.tolist()]


def test_hopeful_stopping_can_miss_what_safe_stopping_finds(both: tuple[Any, TransformerPart]) -> None:
    """Why `Safe` is the default: it never has the worse score, and sometimes the better one."""
    settings = Search(2, 1, Power(1.5), Limit(30))
    safe = search(both[1], *sources(), settings, MARIAN)
    hopeful = search(both[1], *sources(), settings.replace(stop=Hopeful()), MARIAN)
    better = [a[0].score - b[0].score for a, b in zip(safe, hopeful, strict=True)]
    assert min(better) >= 0
    assert max(better) > 0.01
