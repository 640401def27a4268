"""What the contract of parts (test_contract.py) comes to in whole models: masks of both sides, documents, caches.

All in float64, where rounding can't hide a leak. Gradients are compared too.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from polyformer.parts import Causal
from polyformer.parts.flow import GrowingCache, StaticCache
from polyformer.parts.model import TransformerPart
from tests.parts.models import (
    SHAPES,
    Shape,
    assert_same,
    build,
    decoder,
    encoder,
    gradients,
    pad,
    real,
    sentences,
    translator,
)

LENGTHS = (5, 1, 9, 4)

shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
sides = pytest.mark.parametrize("side", ["left", "right"])


def weigh(rows: list[Tensor]) -> Tensor:
    """Make one number of many rows in which each element counts differently."""
    flat = torch.cat([row.flatten() for row in rows])
    return (flat * torch.linspace(-1, 1, len(flat), dtype=flat.dtype)).sum()


def loop(model: TransformerPart, rows: list[Tensor]) -> list[Tensor]:
    """Read each sentence alone and without a mask."""
    return [model(row[None]).hidden[0] for row in rows]


@shapes
@sides
class TestPadding:
    @pytest.mark.parametrize("kind", [encoder, decoder], ids=["encoder", "decoder"])
    def test_a_padded_batch_is_each_sentence_alone(self, shape: Shape, side: str, kind) -> None:
        model = build(kind(shape))
        rows = sentences(LENGTHS)
        ids, mask = pad(rows, side, 11)
        batched = list(real(model(ids, mask).hidden, mask))
        alone = loop(model, rows)
        for one, other in zip(batched, alone, strict=True):
            torch.testing.assert_close(one, other)
        assert_same(gradients(model, weigh(batched)), gradients(model, weigh(alone)))

    def test_padding_of_the_source_and_of_the_target(self, shape: Shape, side: str) -> None:
        model = build(translator(shape))
        sources, targets = sentences(LENGTHS), sentences((3, 6, 2, 1), seed=1)
        ids, mask = pad(sources, side, 10)
        target_ids, target_mask = pad(targets, side, 8)
        batched = list(real(model(ids, mask, target_ids, target_mask).logits, target_mask))
        alone = [model(s[None], None, t[None]).logits[0] for s, t in zip(sources, targets, strict=True)]
        for one, other in zip(batched, alone, strict=True):
            torch.testing.assert_close(one, other)
        assert_same(gradients(model, weigh(batched)), gradients(model, weigh(alone)))

    def test_what_stands_in_the_padding_does_not_matter(self, shape: Shape, side: str) -> None:
        model = build(translator(shape))
        ids, mask = pad(sentences(LENGTHS), side)
        target_ids, target_mask = pad(sentences((3, 6, 2, 1), seed=1), side)
        first = model(ids, mask, target_ids, target_mask).logits
        second = model(ids + (1 - mask) * 5, mask, target_ids + (1 - target_mask) * 9, target_mask).logits
        assert torch.equal(first[target_mask.bool()], second[target_mask.bool()])

    def test_an_empty_sentence_in_a_batch_harms_nobody(self, shape: Shape, side: str) -> None:
        model = build(translator(shape))
        sources, targets = sentences((5, 0, 3)), sentences((2, 4, 0), seed=1)
        ids, mask = pad(sources, side)
        target_ids, target_mask = pad(targets, side)
        out = model(ids, mask, target_ids, target_mask)
        assert torch.isfinite(out.logits).all()
        alone = model(sources[0][None], None, targets[0][None]).logits[0]
        torch.testing.assert_close(next(real(out.logits, target_mask)), alone)
        found = gradients(model, weigh(list(real(out.logits, target_mask))))
        assert all(torch.isfinite(gradient).all() for gradient in found.values())


@shapes
class TestLayout:
    def test_an_order_of_sentences_is_only_an_order(self, shape: Shape) -> None:
        model = build(translator(shape))
        ids, mask = pad(sentences(LENGTHS))
        target_ids, _ = pad(sentences((4, 4, 4, 4), seed=1))
        order = torch.tensor([2, 0, 3, 1])
        straight = model(ids, mask, target_ids).logits
        mixed = model(ids[order], mask[order], target_ids[order]).logits
        torch.testing.assert_close(mixed, straight[order])

    @pytest.mark.parametrize("kind", [encoder, decoder], ids=["encoder", "decoder"])
    def test_packed_documents_are_documents_apart(self, shape: Shape, kind) -> None:
        model = build(kind(shape))
        first, second, third, fourth = rows = sentences(LENGTHS)
        ids = torch.stack([torch.cat((first, third)), torch.cat((second, fourth, sentences((9,), 5)[0]))[:14]])
        documents = torch.tensor([[0] * 5 + [1] * 9, [7] + [2] * 4 + [0] * 9])
        hidden = model(ids, document_ids=documents).hidden
        packed = [hidden[0, :5], hidden[1, :1], hidden[0, 5:], hidden[1, 1:5]]
        alone = loop(model, rows)
        for one, other in zip(packed, alone, strict=True):
            torch.testing.assert_close(one, other)
        assert_same(gradients(model, weigh(packed)), gradients(model, weigh(alone)))

    @pytest.mark.parametrize("kind", [encoder, decoder], ids=["encoder", "decoder"])
    def test_a_batch_of_one_row_packed(self, shape: Shape, kind) -> None:
        model = build(kind(shape))
        rows = sentences(LENGTHS)
        documents = torch.cat([torch.full((len(row),), i) for i, row in enumerate(rows)])
        hidden = model(torch.cat(rows)[None], document_ids=documents[None]).hidden
        torch.testing.assert_close(hidden[0], torch.cat(loop(model, rows)))

    @pytest.mark.parametrize("kind", [encoder, decoder], ids=["encoder", "decoder"])
    def test_a_batch_of_one_row_padded_left(self, shape: Shape, kind) -> None:
        model = build(kind(shape))
        (row,) = sentences((5,))
        ids, mask = pad([row], "left", 8)
        torch.testing.assert_close(model(ids, mask).hidden[0, 3:], model(row[None]).hidden[0])

    @sides
    @pytest.mark.parametrize("kind", [encoder, decoder], ids=["encoder", "decoder"])
    def test_packed_and_padded(self, shape: Shape, side: str, kind) -> None:
        model = build(kind(shape))
        rows = sentences((4, 3))
        ids, mask = pad([torch.cat(rows), sentences((9,), 1)[0]], side)
        documents, _ = pad([torch.tensor([0] * 4 + [1] * 3), torch.zeros(9, dtype=torch.long)], side)
        for filled in (0, 1, 5):
            numbers = documents.where(mask.bool(), filled)
            found = next(real(model(ids, mask, document_ids=numbers).hidden, mask))
            torch.testing.assert_close(found, torch.cat(loop(model, rows)))

    def test_single_precision_is_near_double(self, shape: Shape) -> None:
        ids, mask = pad(sentences(LENGTHS))
        target_ids, target_mask = pad(sentences((3, 6, 2, 1), seed=1))
        exact = build(translator(shape))(ids, mask, target_ids, target_mask).logits
        single = build(translator(shape), torch.float32)(ids, mask, target_ids, target_mask).logits
        assert single.dtype == torch.float32
        torch.testing.assert_close(single.double(), exact, rtol=2e-4, atol=2e-4)

    def test_a_causal_model_does_not_see_what_comes(self, shape: Shape) -> None:
        model = build(decoder(shape, Causal()))
        (row,) = sentences((9,))
        full = model(row[None]).hidden[0]
        for length in (1, 4, 8):
            torch.testing.assert_close(model(row[None, :length]).hidden[0], full[:length])

    def test_training_mode_without_dropout_is_evaluation(self, shape: Shape) -> None:
        model = build(translator(shape))
        ids, _ = pad(sentences((4, 4)))
        assert torch.equal(model(ids, None, ids).logits, model.train()(ids, None, ids).logits)


CACHES = {"growing": GrowingCache, "static": lambda: StaticCache(room=12)}
CHUNKS = {
    "one by one": (1,) * 9,
    "prompt, then one by one": (5, 1, 1, 1, 1),
    "prompt in chunks": (3, 4, 1, 1),
    "whole": (9,),
}


@shapes
@pytest.mark.parametrize("chunks", CHUNKS.values(), ids=CHUNKS.keys())
@pytest.mark.parametrize("make", CACHES.values(), ids=CACHES.keys())
class TestCaches:
    def test_cached_is_full(self, shape: Shape, chunks: tuple[int, ...], make) -> None:
        model = build(decoder(shape))
        ids, _ = pad(sentences((9, 9)))
        cache = make()
        found = [model(part, cache=cache).hidden for part in ids.split(chunks, 1)]
        torch.testing.assert_close(torch.cat(found, 1), model(ids).hidden)
        assert cache.length == 9

    @sides
    def test_cached_and_padded(self, shape: Shape, chunks: tuple[int, ...], make, side: str) -> None:
        model = build(decoder(shape))
        rows = sentences((9, 4, 6))
        ids, mask = pad(rows, side)
        cache, found, done = make(), [], 0
        for part in ids.split(chunks, 1):
            done += part.shape[1]
            found.append(model(part, mask[:, :done], cache=cache).hidden)
        for one, other in zip(real(torch.cat(found, 1), mask), loop(model, rows), strict=True):
            torch.testing.assert_close(one, other)

    def test_cached_documents(self, shape: Shape, chunks: tuple[int, ...], make) -> None:
        model = build(decoder(shape))
        ids, _ = pad(sentences((9, 9)))
        documents = torch.tensor([[0] * 4 + [1] * 5, [0] * 2 + [1] * 3 + [0] * 4])
        cache, found, done = make(), [], 0
        for part in ids.split(chunks, 1):
            done += part.shape[1]
            found.append(model(part, cache=cache, document_ids=documents[:, :done]).hidden)
        torch.testing.assert_close(torch.cat(found, 1), model(ids, document_ids=documents).hidden)

    def test_a_translation_is_cached(self, shape: Shape, chunks: tuple[int, ...], make) -> None:
        model = build(translator(shape))
        ids, mask = pad(sentences((4, 7)))
        target_ids, _ = pad(sentences((9, 9), seed=1))
        memory = model.encode(ids, mask)
        cache = make()
        found = [model.decode(part, None, memory, cache) for part in target_ids.split(chunks, 1)]
        torch.testing.assert_close(torch.cat(found, 1), model(ids, mask, target_ids).hidden)


@shapes
@pytest.mark.parametrize("make", CACHES.values(), ids=CACHES.keys())
@pytest.mark.parametrize("chunks", [(2, 4), (1,) * 6], ids=["in chunks", "one by one"])
def test_a_prompt_padded_right_goes_on(shape: Shape, make, chunks: tuple[int, ...]) -> None:
    """Padding then stands between a prompt and what was written behind it."""
    model = build(decoder(shape))
    rows = sentences((3, 6))
    tails, _ = pad(sentences((6, 6), seed=1))
    ids, mask = pad(rows)
    cache, found = make(), []
    model(ids, mask, cache=cache)
    for part in tails.split(chunks, 1):
        mask = torch.cat((mask, torch.ones_like(part)), 1)
        found.append(model(part, mask, cache=cache).hidden)
    alone = [model(torch.cat((r, t))[None]).hidden[0, len(r) :] for r, t in zip(rows, tails, strict=True)]
    torch.testing.assert_close(torch.cat(found, 1), torch.stack(alone))
