"""The one Transformer: its three shapes, its ties, and inputs that it has no part for."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from polyformer.errors import SpecError
from polyformer.parts import LMHead, Tie, Transformer
from polyformer.parts.model import TransformerPart, parameters_of
from tests.parts.models import (
    EMBEDDINGS,
    SHAPES,
    VOCABULARY,
    WIDTH,
    Shape,
    build,
    decoder,
    encoder,
    pad,
    sentences,
    translator,
)

IDS, MASK = pad(sentences((5, 3)))
TARGET, TARGET_MASK = pad(sentences((4, 2), seed=1))


def three_tied() -> Transformer:
    """The 2017 paper's: both embeddings and the matrix before the softmax are one."""
    spec = translator(Shape())
    return spec.replace(ties=(*spec.ties, Tie("head.projection.weight", "target.tokens.weight")))


def assert_tied(model: nn.Module) -> None:
    assert model.target.tokens.weight is model.source.tokens.weight
    assert model.head.projection.weight is model.source.tokens.weight
    assert len({id(p) for p in model.parameters()}) == len(list(model.parameters()))


class TestShapes:
    def test_encoder_and_decoder(self) -> None:
        model = build(translator(Shape()))
        out = model(input_ids=IDS, attention_mask=MASK, decoder_input_ids=TARGET, decoder_attention_mask=TARGET_MASK)
        assert out.hidden.shape == (2, 4, WIDTH)
        assert out.logits.shape == (2, 4, VOCABULARY)
        assert out.encoder_hidden.shape == (2, 5, WIDTH)
        torch.testing.assert_close(out.encoder_hidden, model.encode(IDS, MASK).hidden)

    def test_encoder_alone(self) -> None:
        out = build(encoder(Shape()))(IDS, MASK)
        assert out.hidden.shape == (2, 5, WIDTH)
        assert out.logits is None
        assert out.encoder_hidden is None

    def test_decoder_alone(self) -> None:
        out = build(decoder(Shape()))(IDS, MASK)
        assert out.logits.shape == (2, 5, VOCABULARY)
        assert out.encoder_hidden is None

    def test_a_memory_can_be_selected(self) -> None:
        memory = build(translator(Shape())).encode(IDS, MASK)
        chosen = memory.select(torch.tensor([1, 1, 0]))
        assert torch.equal(chosen.hidden, memory.hidden[[1, 1, 0]])
        assert torch.equal(chosen.valid, MASK.bool()[[1, 1, 0]])

    @pytest.mark.parametrize("dtype", [torch.long, torch.bool, torch.float32])
    def test_masks_of_any_dtype(self, dtype: torch.dtype) -> None:
        model = build(encoder(Shape()))
        assert torch.equal(model(IDS, MASK.to(dtype)).hidden, model(IDS, MASK).hidden)


class TestRefused:
    @pytest.mark.parametrize("kind", [encoder, decoder], ids=["encoder", "decoder"])
    @pytest.mark.parametrize("name", ["decoder_input_ids", "decoder_attention_mask"])
    def test_inputs_that_nobody_would_read(self, kind, name: str) -> None:
        with pytest.raises(SpecError, match=f"nothing in this model can take {name}"):
            build(kind(Shape()))(IDS, **{name: TARGET})

    def test_a_cache_for_an_encoder(self) -> None:
        from polyformer.parts.flow import GrowingCache

        with pytest.raises(SpecError, match="nothing in this model can take cache"):
            build(encoder(Shape()))(IDS, cache=GrowingCache())

    def test_a_translator_without_a_target(self) -> None:
        with pytest.raises(SpecError, match="needs decoder_input_ids beside input_ids"):
            build(translator(Shape()))(IDS)

    def test_halves_that_are_not_there(self) -> None:
        with pytest.raises(SpecError, match="this model has no encoder"):
            build(decoder(Shape())).encode(IDS)
        with pytest.raises(SpecError, match="this model has no decoder"):
            build(encoder(Shape())).decode(IDS)

    def test_cross_attention_without_a_memory(self) -> None:
        with pytest.raises(SpecError, match="needs an encoder's output"):
            build(translator(Shape())).decode(TARGET)

    def test_a_model_of_nothing(self) -> None:
        with pytest.raises(SpecError, match="needs an encoder or a decoder"):
            Transformer()

    @pytest.mark.parametrize(
        "given", [{"attention_mask": MASK[:, :4]}, {"decoder_attention_mask": MASK}, {"document_ids": MASK[:1]}]
    )
    def test_masks_of_wrong_shapes(self, given: dict[str, torch.Tensor]) -> None:
        with pytest.raises(SpecError, match=r"shape \[\d, \d\]"):
            build(translator(Shape()))(IDS, decoder_input_ids=TARGET, **given)


class TestTies:
    def test_built_tied(self) -> None:
        model = three_tied().build()
        assert_tied(model)
        untied = three_tied().replace(ties=()).build()
        assert parameters_of(untied) - parameters_of(model) == 2 * VOCABULARY * WIDTH

    def test_on_the_meta_device_and_back(self) -> None:
        model = three_tied().build("meta")
        assert_tied(model)
        assert_tied(model.to_empty(device="cpu"))

    @pytest.mark.parametrize("change", [lambda m: m.to(torch.float64), lambda m: m.half(), lambda m: m.to("meta")])
    def test_after_a_move(self, change) -> None:
        assert_tied(change(three_tied().build()))

    def test_after_a_copy(self) -> None:
        model = copy.deepcopy(three_tied().build())
        assert_tied(model)

    @pytest.mark.parametrize("assign", [False, True])
    def test_after_loading(self, assign: bool) -> None:
        old, new = three_tied().build(), three_tied().build()
        new.load_state_dict(old.state_dict(), assign=assign)
        if assign:
            new.tie()
        assert_tied(new)
        assert torch.equal(new.source.tokens.weight, old.source.tokens.weight)

    def test_gradients_of_all_uses_add_up(self) -> None:
        tied, free = build(three_tied()), build(three_tied().replace(ties=()))
        free.load_state_dict(tied.state_dict())
        for model in (tied, free):
            model(IDS, MASK, TARGET, TARGET_MASK).logits.square().mean().backward()
        parts = [free.source.tokens.weight, free.target.tokens.weight, free.head.projection.weight]
        torch.testing.assert_close(tied.source.tokens.weight.grad, sum(p.grad for p in parts))

    def test_a_step_of_an_optimiser_keeps_them(self) -> None:
        model = build(three_tied())
        optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
        before = model.source.tokens.weight.detach().clone()
        model(IDS, None, TARGET).logits.square().mean().backward()
        optimiser.step()
        assert_tied(model)
        assert not torch.equal(model.head.projection.weight, before)

    def test_ties_that_can_not_be(self) -> None:
        spec = translator(Shape())
        with pytest.raises(SpecError, match=r"a tie names 'head.weight', which is no parameter of this model"):
            spec.replace(ties=(Tie("head.weight", "source.tokens.weight"),)).build()
        other = spec.replace(
            head=LMHead.of_width(WIDTH, 5), ties=(Tie("head.projection.weight", "source.tokens.weight"),)
        )
        with pytest.raises(SpecError, match=r"head.projection.weight \[5, 12\] can't be tied to source.* \[17, 12\]"):
            other.build("meta")


def test_every_shape_of_model_counts_its_parameters() -> None:
    for shape in SHAPES.values():
        model = build(translator(shape))
        distinct = {id(p): p.numel() for p in model.parameters()}
        assert parameters_of(model) == sum(distinct.values())
        assert isinstance(model, TransformerPart)


def test_tracing_changes_no_answer() -> None:
    from polyformer.parts import Trace

    model, trace = build(translator(Shape())), Trace()
    plain = model(IDS, MASK, TARGET, TARGET_MASK)
    traced = model(IDS, MASK, TARGET, TARGET_MASK, trace=trace)
    assert torch.equal(plain.logits, traced.logits)
    assert list(trace.attention) == [
        "encoder.0.steps.0.op",
        "encoder.1.steps.0.op",
        "decoder.0.steps.0.op",
        "decoder.0.steps.1.op",
        "decoder.1.steps.0.op",
        "decoder.1.steps.1.op",
    ]
    crossing = trace.attention["decoder.1.steps.1.op"]
    assert crossing.shape == (2, 4, 4, 5)
    assert (crossing[1, :, :, 3:] == 0).all()


def test_embeddings_are_as_the_tests_need_them() -> None:
    assert {shape.positions for shape in SHAPES.values()} == set(EMBEDDINGS)
