"""The quick way to the best tokens equals sorting."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from polyformer.generate import candidates
from polyformer.generate.candidates import best_tokens, top
from polyformer.parts import LMHead
from polyformer.parts.part import Part


@given(
    st.integers(0, 10_000), st.integers(1, 9), st.sampled_from([1, 5, 70, 1100, 9000, 20_011]), st.integers(1, 10**6)
)
def test_top_equals_a_stable_sort(seed: int, count: int, vocabulary: int, distinct: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(distinct, (3, vocabulary), generator=generator).float()
    expected = scores.sort(dim=1, descending=True, stable=True)
    values, columns = top(scores, count)
    assert torch.equal(values, expected.values[:, :count])
    assert torch.equal(columns, expected.indices[:, :count])


def plain_head(vocabulary: int) -> Part:
    return LMHead.of_width(8, vocabulary, bias=True).build().eval()


@pytest.mark.parametrize("vocabulary", [5, 300, 20_000])
@pytest.mark.parametrize("forbidden", [[], [0], [0, 3]])
def test_log_probabilities_are_those_of_the_whole_vocabulary(
    vocabulary: int, forbidden: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(candidates, "CHUNK_BYTES", 4 * vocabulary * 3)  # three rows at a time
    head, hidden = plain_head(vocabulary), torch.randn(8, 8) * 5
    with torch.no_grad():
        found = best_tokens(head, hidden, 4, torch.tensor(forbidden, dtype=torch.long))
        expected = head(hidden, None).double().log_softmax(-1)
    expected[:, forbidden] = -math.inf
    expected_top = expected.topk(4)
    assert torch.equal(found.ids[:, :2], expected_top.indices[:, :2])
    assert torch.allclose(found.log_probabilities.double(), expected_top.values, atol=1e-5)


def test_no_log_probability_is_above_zero() -> None:
    head = plain_head(50)
    with torch.inference_mode():
        found = best_tokens(head, torch.randn(500, 8) * 100, 3, torch.tensor([0]))
    assert bool((found.log_probabilities <= 0).all())
    assert not bool(found.log_probabilities.isnan().any())
