from __future__ import annotations

import json
import time

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from polyformer.data import Batch, Batches, BatchRecipe, Encoded, Pair, PairTokenizer, TokenizerRecipe, encode_pairs
from polyformer.data.batches import IGNORED, Column
from polyformer.errors import DataError, RunError, SpecError

from .makers import english_chinese, english_german

PAD, BOS, EOS = 0, 1, 2


def encoded(lengths: list[tuple[int, int]]) -> Encoded:
    """Pairs of these lengths, whose ids tell them apart."""
    sources = [[*range(10 + i, 9 + i + length), EOS] for i, (length, _) in enumerate(lengths)]
    targets = [[*range(500 + i, 499 + i + length), EOS] for i, (_, length) in enumerate(lengths)]
    pairs = [Pair(f"source {i}", f"target {i}", "en", "de") for i in range(len(lengths))]
    return Encoded(Column(sources), Column(targets), pairs, PAD, BOS)


LENGTHS = st.lists(st.tuples(st.integers(1, 20), st.integers(1, 20)), min_size=1, max_size=60)


def epoch(batches: Batches) -> list[Batch]:
    return [next(batches) for _ in range(len(batches))]


def same(one: Batch, other: Batch) -> bool:
    return (one.rows == other.rows).all() and all(
        torch.equal(getattr(one, name), getattr(other, name))
        for name in ("input_ids", "attention_mask", "decoder_input_ids", "decoder_attention_mask", "labels")
    )


def check(batch: Batch, data: Encoded, tokens: int) -> None:
    """The batch holds its rows and nothing else, and is no wider than they need."""
    for ids, mask, column in (
        (batch.input_ids, batch.attention_mask, data.source),
        (batch.labels, batch.decoder_attention_mask, data.target),
    ):
        assert ids.dtype == torch.int64
        assert mask.dtype == torch.bool
        assert ids.shape == mask.shape == (len(batch.rows), int(column.lengths[batch.rows].max()))
        assert ids.numel() <= tokens
        for row, line, real in zip(batch.rows, ids.tolist(), mask.tolist(), strict=True):
            expected = column.flat[column.starts[row] : column.starts[row + 1]].tolist()
            fill = IGNORED if ids is batch.labels else PAD
            assert line == expected + [fill] * (len(line) - len(expected))
            assert real == [True] * len(expected) + [False] * (len(line) - len(expected))
    moved = torch.where(batch.labels == IGNORED, PAD, batch.labels)[:, :-1]
    kept = batch.decoder_attention_mask[:, 1:]
    assert (batch.decoder_input_ids[:, 0] == BOS).all()
    assert torch.equal(batch.decoder_input_ids[:, 1:], torch.where(kept, moved, PAD))
    assert batch.target_tokens == int((batch.labels != IGNORED).sum())


@given(LENGTHS, st.integers(20, 100), st.integers(0, 5))
def test_each_epoch_and_the_evaluation_cover_every_pair_once(
    lengths: list[tuple[int, int]], tokens: int, seed: int
) -> None:
    data = encoded(lengths)
    batches = Batches(data, BatchRecipe(tokens, seed=seed))
    for given_batches in (list(batches.in_order()), epoch(batches), epoch(batches)):
        assert sorted(np.concatenate([batch.rows for batch in given_batches]).tolist()) == list(range(len(lengths)))
        for batch in given_batches:
            check(batch, data, tokens)
    assert (batches.epoch, batches.index) == (2, 0)
    widths = [max(batch.input_ids.shape[1], batch.labels.shape[1]) for batch in batches.in_order()]
    assert widths == sorted(widths)


@given(LENGTHS, st.integers(20, 60), st.integers(0, 40), st.integers(0, 3))
def test_restored_it_goes_on_as_if_undisturbed(
    lengths: list[tuple[int, int]], tokens: int, steps: int, seed: int
) -> None:
    data, recipe = encoded(lengths), BatchRecipe(tokens, seed=seed)
    batches = Batches(data, recipe)
    for _ in range(steps):
        next(batches)
    state = json.loads(json.dumps(batches.state()))
    list(batches.in_order())
    again = Batches(encoded(lengths), recipe)
    again.restore(state)
    for _ in range(2 * len(batches)):
        assert same(next(batches), next(again))
    batches.restore(state)
    assert batches.state() == state


def test_epochs_differ_and_seeds_differ_but_lengths_stay_together() -> None:
    data = encoded([(i % 7 + 1, i % 5 + 1) for i in range(400)])
    batches = Batches(data, BatchRecipe(60))
    first, second = epoch(batches), epoch(batches)
    other = epoch(Batches(data, BatchRecipe(60, seed=1)))
    rows = [[tuple(batch.rows.tolist()) for batch in one] for one in (first, second, other)]
    assert rows[0] != rows[1] != rows[2] != rows[0]
    assert set(rows[0]) != set(rows[1])
    assert [batch.target_tokens for batch in first] != sorted(batch.target_tokens for batch in first)
    assert rows[0] == [tuple(batch.rows.tolist()) for batch in epoch(Batches(data, BatchRecipe(60)))]


def test_a_state_of_other_data_is_refused() -> None:
    state = Batches(encoded([(3, 4), (5, 6)]), BatchRecipe(40)).state()
    for data, recipe in (
        (encoded([(3, 4), (5, 7)]), BatchRecipe(40)),
        (encoded([(3, 4), (5, 6)]), BatchRecipe(41)),
        (encoded([(3, 4), (5, 6)]), BatchRecipe(40, seed=1)),
    ):
        with pytest.raises(RunError, match="resume with the same data and recipe"):
            Batches(data, recipe).restore(state)


def test_a_budget_that_cannot_hold_one_sentence_names_it() -> None:
    with pytest.raises(
        DataError, match=r"a batch of 8 tokens can't hold a sentence of 9: 'source 1' → 'target 1'; raise"
    ):
        Batches(encoded([(8, 8), (2, 9), (3, 3)]), BatchRecipe(8))


def test_padding_is_little_for_natural_lengths() -> None:
    chance = np.random.default_rng(0)
    source = np.clip(chance.gamma(2, 8, 20_000), 1, 120).astype(int)
    target = np.clip(source * chance.normal(1.1, 0.2, 20_000), 1, 128).astype(int)
    data = encoded(list(zip(source.tolist(), target.tolist(), strict=True)))
    batches = Batches(data, BatchRecipe(2048))
    assert 0 < batches.padding < 0.05
    real = sum(int(batch.attention_mask.sum()) + batch.target_tokens for batch in batches.in_order())
    given_tokens = sum(batch.input_ids.numel() + batch.labels.numel() for batch in batches.in_order())
    assert batches.padding == pytest.approx(1 - real / given_tokens)
    start = time.process_time()
    epoch(batches)
    assert time.process_time() - start < 10


TOKENS = PairTokenizer.train([*english_german(), *english_chinese()], TokenizerRecipe("bpe", 200))


def test_pairs_are_encoded_with_tags_and_ends() -> None:
    pairs = [*english_german()[:5], *english_chinese()[:5]]
    data = encode_pairs(TOKENS, pairs, BatchRecipe())
    batch = next(iter(Batches(data, BatchRecipe(4096)).in_order()))
    for row, source, target in zip(batch.rows, batch.input_ids.tolist(), batch.labels.tolist(), strict=True):
        pair = pairs[row]
        assert [i for i in source if i != TOKENS.pad_id] == TOKENS.encode_source(pair.source, pair.target_language)
        assert [i for i in target if i != IGNORED] == TOKENS.encode_target(pair.target)


def test_long_pairs_are_dropped_and_counted_or_refused() -> None:
    pairs = [*english_german()[:5], Pair("Open the file and " * 30, "Öffne Datei", "en", "de")]
    data = encode_pairs(TOKENS, pairs, BatchRecipe(longest=64))
    assert (len(data), data.dropped, data.pairs) == (5, 1, pairs[:5])
    with pytest.raises(
        DataError, match=r"too long \(\d+ and \d+ tokens, longest is 64\): 'Open the file .*…' → 'Öffne Datei'"
    ):
        encode_pairs(TOKENS, pairs, BatchRecipe(longest=64, too_long="refuse"))
    with pytest.raises(DataError, match="none of 1 pairs has at most 64 tokens"):
        encode_pairs(TOKENS, pairs[5:], BatchRecipe(longest=64))


def test_a_recipe_that_cannot_be_is_refused() -> None:
    for wrong in ({"tokens": 0}, {"longest": 1}, {"too_long": "cut"}):
        with pytest.raises(SpecError):
            BatchRecipe().replace(**wrong)
