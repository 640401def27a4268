"""Continuing texts: greedy is the likeliest token each time, a batch is one by one, chance obeys its seed."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from polyformer.errors import RunError, SpecError
from polyformer.generate import Sampling, continue_texts
from polyformer.parts import (
    Attention,
    Causal,
    Convolution,
    Embed,
    FeedForward,
    LayerNorm,
    Learned,
    LMHead,
    Residual,
    Rotary,
    Stack,
    TokenEmbedding,
    Transformer,
)
from polyformer.parts.model import TransformerPart
from polyformer.parts.residual import Chain

VOCABULARY = 31


def decoder(rotary: bool = True, length: int = 20) -> TransformerPart:
    """A small random decoder, with rotated or with learned positions."""
    torch.manual_seed(3)
    attention = Attention.of_width(16, 2, Causal()).replace(position=Rotary(8) if rotary else None)
    norm = LayerNorm(16)
    block = Chain((Residual(attention, pre=norm), Residual(FeedForward.of_widths(16, 32), pre=norm)))
    embed = Embed(TokenEmbedding(VOCABULARY, 16), None if rotary else Learned(16, length))
    model = Transformer(target=embed, decoder=Stack((block, block), norm), head=LMHead.of_width(16, VOCABULARY)).build()
    assert isinstance(model, TransformerPart)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return model.eval()


PROMPTS = [[5, 6, 7], [1], [9, 8, 7, 6, 5, 4, 3]]


def slowly(model: TransformerPart, prompt: list[int], limit: int) -> list[int]:
    """The likeliest token each time, with the whole text read anew for each."""
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(limit):
            logits = model(input_ids=torch.tensor([ids])).logits
            assert logits is not None
            ids.append(int(logits[0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("rotary", [True, False])
def test_greedy_without_a_cache_is_the_same(rotary: bool) -> None:
    model = decoder(rotary)
    found = continue_texts(model, PROMPTS, Sampling(limit=12), ())
    assert [one.ids for one in found] == [slowly(model, prompt, 12) for prompt in PROMPTS]
    assert not any(one.ended for one in found)


def test_what_can_not_go_on_from_a_cache_reads_all_again() -> None:
    spec = decoder().spec
    assert isinstance(spec, Transformer)
    assert isinstance(spec.decoder, Stack)
    hears = Residual(Convolution(16, 16, 3, padding=1))
    torch.manual_seed(3)
    model = spec.replace(decoder=spec.decoder.replace(blocks=(*spec.decoder.blocks, hears))).build().eval()
    assert isinstance(model, TransformerPart)
    found = continue_texts(model, PROMPTS, Sampling(limit=7), ())
    assert [one.ids for one in found] == [slowly(model, prompt, 7) for prompt in PROMPTS]


def test_more_than_the_first_room() -> None:
    model = decoder()
    (found,) = continue_texts(model, [[4]], Sampling(limit=300), ())
    assert len(found.ids) == 300
    assert found.ids[:12] == slowly(model, [4], 12)


@pytest.mark.parametrize("settings", [Sampling(temperature=0.9, limit=9, seed=4), Sampling(1.5, 5, 0.8, 9, 1)])
def test_a_batch_is_one_by_one(settings: Sampling) -> None:
    model = decoder()
    together = continue_texts(model, PROMPTS, settings, ())
    for i, prompt in enumerate(PROMPTS):
        (alone,) = continue_texts(model, [prompt], settings.replace(seed=settings.seed + i), ())
        assert alone.ids == together[i].ids
        assert alone.log_probability == pytest.approx(together[i].log_probability, abs=1e-4)


def test_log_probabilities_are_the_model_s() -> None:
    model = decoder()
    (found,) = continue_texts(model, [[5, 6]], Sampling(temperature=0.7, limit=6), ())
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[5, 6, *found.ids]])).logits
    assert logits is not None
    likely = torch.log_softmax(logits[0], -1)[1:-1]
    wanted = sum(float(row[token]) for row, token in zip(likely, found.ids, strict=True))
    assert found.log_probability == pytest.approx(wanted, abs=1e-4)


def test_an_end_token_ends_its_row_only() -> None:
    model = decoder()
    free = continue_texts(model, PROMPTS, Sampling(limit=8), ())
    end = free[0].ids[3]
    stopped = continue_texts(model, PROMPTS, Sampling(limit=8), (end,))
    for before, after in zip(free, stopped, strict=True):
        cut = before.ids.index(end) if end in before.ids else None
        assert after.ids == before.ids[:cut]
        assert after.ended == (cut is not None)


def test_cuts_of_the_distribution() -> None:
    """With one candidate left, chance has nothing to choose; and a cut never lets a token outside of it through."""
    model = decoder()
    greedy = continue_texts(model, PROMPTS, Sampling(limit=6), ())
    for one in (Sampling(2.0, 1, None, 6), Sampling(2.0, None, 1e-6, 6)):
        assert [row.ids for row in continue_texts(model, PROMPTS, one, ())] == [row.ids for row in greedy]
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[1]])).logits
    assert logits is not None
    best = set(logits[0, -1].topk(3).indices.tolist())
    drawn = {continue_texts(model, [[1]], Sampling(5.0, 3, None, 1, seed), ())[0].ids[0] for seed in range(60)}
    assert drawn == best


def test_the_limit_is_that_of_the_positions() -> None:
    model = decoder(rotary=False, length=10)
    (found,) = continue_texts(model, [[1, 2, 3]], Sampling(limit=50), ())
    assert len(found.ids) == 8  # the last is written by the row of the tenth position


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([[]], "at least one token"),
        ([], "at least one token"),
        ([[VOCABULARY]], "outside of the vocabulary of 31"),
        ([[-1]], "outside of the vocabulary"),
        ([[1] * 11], "a prompt of 11 tokens is longer than the model's 10 positions"),
    ],
)
def test_prompts_that_can_not_be(prompts: Any, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        continue_texts(decoder(rotary=False, length=10), prompts, Sampling(), ())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temperature": -1}, "temperature must be 0 or more"),
        ({"temperature": float("nan")}, "temperature should be a number"),
        ({"stop": ("a\ud83d",)}, "half of a surrogate pair"),
        ({"top_k": 0}, "top_k must be at least 1"),
        ({"top_p": 0.0}, "top_p must be in"),
        ({"limit": 0}, "limit must be at least 1"),
        ({"seed": -1}, "seed must be"),
    ],
)
def test_settings_that_can_not_be(values: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        Sampling(**values)


def test_other_models_are_refused() -> None:
    model = decoder()
    headless = model.spec.replace(head=None).build()
    with pytest.raises(SpecError, match="needs a decoder with a language model head"):
        continue_texts(headless, [[1]], Sampling(), ())  # type: ignore[arg-type]


def test_numbers_that_are_none() -> None:
    model = decoder()
    head = model.head
    assert head is not None
    with torch.no_grad():
        next(head.parameters()).fill_(float("nan"))
    with pytest.raises(RunError, match="no numbers"):
        continue_texts(model, [[1]], Sampling(), ())
