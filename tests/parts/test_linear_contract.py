"""The contract, signed by attention of linear cost: the same answer however the work is laid out. All in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from polyformer.errors import SpecError
from polyformer.parts import Alibi, Attention, Causal, Everyone, Transformer, Window
from polyformer.parts.flow import GrowingCache, Trace
from polyformer.spec import Record, rewrite
from polyformer.swap import SwapKernel, transplant
from tests.parts.linear import KERNELS, SHAPE, with_kernel, with_retention
from tests.parts.models import assert_same, build, decoder, encoder, gradients, pad, real, sentences, translator
from tests.parts.test_invariance import CACHES, CHUNKS, LENGTHS, loop, weigh


def _kernels(make: Callable[..., Transformer]) -> dict[str, Transformer]:
    return {name: with_kernel(make(SHAPE), kernel) for name, kernel in KERNELS.items()}


DECODERS = {**_kernels(decoder), "retention": with_retention(decoder(SHAPE))}
ENCODERS = _kernels(encoder)
READERS = {
    **{f"{name}-decoder": one for name, one in DECODERS.items()},
    **{f"{name}-encoder": one for name, one in ENCODERS.items()},
}

readers = pytest.mark.parametrize("spec", READERS.values(), ids=READERS.keys())
decoders = pytest.mark.parametrize("spec", DECODERS.values(), ids=DECODERS.keys())
sides = pytest.mark.parametrize("side", ["left", "right"])
caches = pytest.mark.parametrize("make", CACHES.values(), ids=CACHES.keys())
chunked = pytest.mark.parametrize("chunks", CHUNKS.values(), ids=CHUNKS.keys())


@readers
class TestLayout:
    @sides
    def test_a_padded_batch_is_each_sentence_alone(self, spec: Transformer, side: str) -> None:
        model = build(spec)
        rows = sentences(LENGTHS)
        ids, mask = pad(rows, side, 11)
        batched = list(real(model(ids, mask).hidden, mask))
        alone = loop(model, rows)
        for one, other in zip(batched, alone, strict=True):
            torch.testing.assert_close(one, other)
        assert_same(gradients(model, weigh(batched)), gradients(model, weigh(alone)))

    @sides
    def test_an_empty_sentence_harms_nobody(self, spec: Transformer, side: str) -> None:
        model = build(spec)
        rows = sentences((5, 0, 3))
        ids, mask = pad(rows, side)
        found = list(real(model(ids, mask).hidden, mask))
        torch.testing.assert_close(found[0], model(rows[0][None]).hidden[0])
        assert all(one.isfinite().all() for one in gradients(model, weigh(found)).values())

    def test_what_stands_in_the_padding_does_not_matter(self, spec: Transformer) -> None:
        model = build(spec)
        ids, mask = pad(sentences(LENGTHS))
        first, second = (model(one, mask).hidden for one in (ids, ids + (1 - mask) * 5))
        assert torch.equal(first[mask.bool()], second[mask.bool()])

    def test_an_order_of_sentences_is_only_an_order(self, spec: Transformer) -> None:
        model = build(spec)
        ids, mask = pad(sentences(LENGTHS))
        order = torch.tensor([2, 0, 3, 1])
        torch.testing.assert_close(model(ids[order], mask[order]).hidden, model(ids, mask).hidden[order])

    def test_packed_documents_are_documents_apart(self, spec: Transformer) -> None:
        model = build(spec)
        first, second, third, fourth = rows = sentences(LENGTHS)
        ids = torch.stack([torch.cat((first, third)), torch.cat((second, fourth, sentences((9,), 5)[0]))[:14]])
        documents = torch.tensor([[0] * 5 + [1] * 9, [7] + [2] * 4 + [0] * 9])
        hidden = model(ids, document_ids=documents).hidden
        packed = [hidden[0, :5], hidden[1, :1], hidden[0, 5:], hidden[1, 1:5]]
        alone = loop(model, rows)
        for one, other in zip(packed, alone, strict=True):
            torch.testing.assert_close(one, other)
        assert_same(gradients(model, weigh(packed)), gradients(model, weigh(alone)))

    @sides
    def test_packed_and_padded(self, spec: Transformer, side: str) -> None:
        model = build(spec)
        rows = sentences((4, 3))
        ids, mask = pad([torch.cat(rows), sentences((9,), 1)[0]], side)
        documents, _ = pad([torch.tensor([0] * 4 + [1] * 3), torch.zeros(9, dtype=torch.long)], side)
        for filled in (0, 1, 5):
            numbers = documents.where(mask.bool(), filled)
            found = next(real(model(ids, mask, document_ids=numbers).hidden, mask))
            torch.testing.assert_close(found, torch.cat(loop(model, rows)))

    def test_a_document_in_two_pieces_is_refused(self, spec: Transformer) -> None:
        with pytest.raises(SpecError, match="each packed document must stand in one piece"):
            build(spec)(torch.zeros(1, 4, dtype=torch.long), document_ids=torch.tensor([[0, 1, 1, 0]]))

    def test_single_precision_is_near(self, spec: Transformer) -> None:
        wide, narrow = build(spec), build(spec, torch.float32)
        narrow.load_state_dict(wide.state_dict())
        ids, mask = pad(sentences(LENGTHS))
        found = narrow(ids, mask).hidden
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), wide(ids, mask).hidden, atol=2e-4, rtol=1e-3)

    @pytest.mark.parametrize("length", [0, 1, 2, 13])
    def test_any_length(self, spec: Transformer, length: int) -> None:
        ids, _ = pad(sentences((length, length)))
        found = build(spec)(ids).hidden
        assert found.shape[:2] == (2, length)
        assert found.isfinite().all()


@decoders
class TestDecoders:
    def test_what_comes_is_not_seen(self, spec: Transformer) -> None:
        model = build(spec)
        (row,) = sentences((9,))
        full = model(row[None]).hidden[0]
        for length in (1, 4, 8):
            torch.testing.assert_close(model(row[None, :length]).hidden[0], full[:length])

    @caches
    @chunked
    def test_cached_is_full(self, spec: Transformer, chunks: tuple[int, ...], make) -> None:
        model = build(spec)
        ids, _ = pad(sentences((9, 9)))
        cache = make()
        found = [model(part, cache=cache).hidden for part in ids.split(chunks, 1)]
        torch.testing.assert_close(torch.cat(found, 1), model(ids).hidden)

    @caches
    @chunked
    @sides
    def test_cached_and_padded(self, spec: Transformer, chunks: tuple[int, ...], make, side: str) -> None:
        model = build(spec)
        rows = sentences((9, 4, 6))
        ids, mask = pad(rows, side)
        cache, found, done = make(), [], 0
        for part in ids.split(chunks, 1):
            done += part.shape[1]
            found.append(model(part, mask[:, :done], cache=cache).hidden)
        for one, other in zip(real(torch.cat(found, 1), mask), loop(model, rows), strict=True):
            torch.testing.assert_close(one, other)

    @chunked
    def test_cached_documents(self, spec: Transformer, chunks: tuple[int, ...]) -> None:
        model = build(spec)
        ids, _ = pad(sentences((9, 9)))
        documents = torch.tensor([[0] * 4 + [1] * 5, [0] * 2 + [1] * 3 + [2] * 4])
        cache, found, done = GrowingCache(), [], 0
        for part in ids.split(chunks, 1):
            done += part.shape[1]
            found.append(model(part, cache=cache, document_ids=documents[:, :done]).hidden)
        torch.testing.assert_close(torch.cat(found, 1), model(ids, document_ids=documents).hidden)

    @caches
    @pytest.mark.parametrize("chunks", [(2, 4), (1,) * 6], ids=["in chunks", "one by one"])
    def test_a_prompt_padded_right_goes_on(self, spec: Transformer, make, chunks: tuple[int, ...]) -> None:
        model = build(spec)
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

    @caches
    @pytest.mark.parametrize("rows", [[2, 0, 1], [1, 1, 1], [2, 0], [0, 0, 1, 2, 2]])
    @pytest.mark.parametrize("padded", [False, True])
    def test_rows_go_where_they_are_sent(self, spec: Transformer, make, rows: list[int], padded: bool) -> None:
        model = build(spec)
        ids, mask = pad(sentences((5, 3, 4) if padded else (5, 5, 5)))
        chosen = torch.tensor(rows)
        then, _ = pad(sentences((4,) * len(rows), seed=1))
        cache = make()
        with torch.no_grad():
            model(ids, mask, cache=cache)
            cache.reorder(chosen)
            found, seen = [], mask[chosen]
            for part in then.split((1, 3), 1):
                seen = torch.cat((seen, torch.ones_like(part)), 1)
                found.append(model(part, seen, cache=cache).hidden)
            expected = model(torch.cat((ids[chosen], then), 1), seen).hidden[:, 5:]
        torch.testing.assert_close(torch.cat(found, 1), expected)

    def test_what_a_cache_holds_does_not_grow(self, spec: Transformer) -> None:
        model, cache, sizes = build(spec), GrowingCache(), []
        ids, _ = pad(sentences((30, 30)))
        for part in ids.split(10, 1):
            model(part, cache=cache)
            sizes.append(cache.bytes)
        assert sizes[0] > 0
        assert sizes == [sizes[0]] * 3

    def test_gradients_go_through_a_cache(self, spec: Transformer) -> None:
        model = build(spec)
        ids, _ = pad(sentences((6, 6)))
        weight = model.target.tokens.weight
        (full,) = torch.autograd.grad(model(ids).hidden[:, 4:].square().sum(), [weight])
        cache = GrowingCache()
        model(ids[:, :4], cache=cache)
        (cached,) = torch.autograd.grad(model(ids[:, 4:], cache=cache).hidden.square().sum(), [weight])
        torch.testing.assert_close(cached, full)


@caches
def test_layers_with_sums_and_layers_with_keys_share_a_cache(make) -> None:
    plain, others = decoder(SHAPE), (DECODERS["retention"], DECODERS["performer"])
    blocks = (plain.decoder.blocks[0], *(one.decoder.blocks[0] for one in others))
    model = build(plain.replace(decoder=plain.decoder.replace(blocks=blocks)))
    ids, _ = pad(sentences((9, 9)))
    cache = make()
    found = [model(part, cache=cache).hidden for part in ids.split((4, 1, 1, 3), 1)]
    torch.testing.assert_close(torch.cat(found, 1), model(ids).hidden)
    assert sorted(cache.states) == [f"decoder.{i}.steps.0.op" for i in (1, 2)]


@pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS.keys())
class TestKernels:
    def test_a_translation_is_cached(self, kernel) -> None:
        model = build(with_kernel(translator(SHAPE), kernel))
        ids, mask = pad(sentences((4, 7)))
        target_ids, _ = pad(sentences((9, 9), seed=1))
        memory, cache = model.encode(ids, mask), GrowingCache()
        found = [model.decode(part, None, memory, cache) for part in target_ids.split((5, 1, 3), 1)]
        torch.testing.assert_close(torch.cat(found, 1), model(ids, mask, target_ids).hidden)

    def test_hypotheses_share_a_sentence(self, kernel) -> None:
        model = build(with_kernel(translator(SHAPE), kernel))
        ids, mask = pad(sentences((4, 7)))
        target_ids, _ = pad(sentences((3,) * 4, seed=1))
        shared = model.decode(target_ids, None, model.encode(ids, mask))
        each = model(ids.repeat_interleave(2, 0), mask.repeat_interleave(2, 0), target_ids).hidden
        torch.testing.assert_close(shared, each)

    def test_without_an_order_a_cache_is_refused(self, kernel) -> None:
        model = build(with_kernel(decoder(SHAPE.replace(positions="without"), Everyone()), kernel))
        with pytest.raises(SpecError, match="Attention can't be cached"):
            model(torch.zeros(1, 3, dtype=torch.long), cache=GrowingCache())

    def test_other_rules_are_refused(self, kernel) -> None:
        name = type(kernel).__name__
        with pytest.raises(SpecError, match=rf"{name} can't follow .*can't honour the rule Window; it knows Every"):
            with_kernel(decoder(SHAPE, Causal() & Window(64)), kernel)

    def test_a_score_bias_is_refused(self, kernel) -> None:
        def biased(path: str, record: Record) -> Record:
            return record.replace(position=Alibi(4)) if isinstance(record, Attention) else record

        model = build(rewrite(with_kernel(decoder(SHAPE), kernel), biased))
        with pytest.raises(SpecError, match=f"{type(kernel).__name__} makes no scores that a position could add"):
            model(torch.zeros(1, 3, dtype=torch.long))

    def test_weights_can_be_traced_but_not_of_what_was_summed(self, kernel) -> None:
        model = build(with_kernel(decoder(SHAPE), kernel))
        ids, mask = pad(sentences((5, 3)))
        plain, cache, trace = model(ids, mask).hidden, GrowingCache(), Trace()
        torch.testing.assert_close(model(ids, mask, cache=cache, trace=trace).hidden, plain)
        for weights in trace.attention.values():
            assert weights.shape == (2, 4, 5, 5)
            assert (weights.triu(1) == 0).all()
            assert (weights[1, :, :, 3:] == 0).all()
            torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, 5, dtype=torch.float64))
        with pytest.raises(SpecError, match="holds sums of earlier keys"):
            model(ids[:, :1], torch.ones(2, 6), cache=cache, trace=Trace())

    def test_a_model_can_be_swapped_to_it(self, kernel) -> None:
        old = build(decoder(SHAPE))
        new, report = transplant(old, SwapKernel(kernel).apply(old.spec))
        assert new.spec == with_kernel(decoder(SHAPE), kernel)
        ours = dict(new.named_parameters())
        assert all(torch.equal(ours[name], weight) for name, weight in old.named_parameters())
        fates = {name: entry.fate for entry in report.tensors for name in entry.names}
        assert {name for name, fate in fates.items() if fate != "kept"} == new.state_dict().keys() - ours.keys()
        assert new(torch.zeros(1, 5, dtype=torch.long)).logits.isfinite().all()
