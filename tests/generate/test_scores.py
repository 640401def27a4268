"""NumPy's scores and PyTorch's: the same questions, the same answers."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from polyformer.generate.scores import finite, likeliest, log_sums, tensor_of


def test_sums_of_rows() -> None:
    scores = 20 * torch.randn(7, 999)
    scores[1, 3:] = float("-inf")
    found, wanted = log_sums(scores.numpy()), scores.double().logsumexp(-1).float()
    assert tensor_of(found).dtype == torch.float32
    assert torch.allclose(tensor_of(found), wanted, rtol=1e-6)
    assert torch.allclose(tensor_of(log_sums(scores)), wanted, rtol=1e-6)


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), float("-inf")])
def test_rows_without_a_sum_are_told(wrong: float) -> None:
    scores = torch.zeros(2, 5)
    scores[0] = wrong
    assert finite(log_sums(scores)) == finite(log_sums(scores.numpy())) == [False, True]


@pytest.mark.parametrize("count", [1, 4, 50, 60])
def test_the_likeliest(count: int) -> None:
    row = torch.randperm(50).float()
    assert likeliest(row.numpy(), count) == likeliest(row, count)
    assert likeliest(np.zeros(9, dtype=np.float32), 3) == ((0, 0.0), (1, 0.0), (2, 0.0))


def test_memory_is_shared() -> None:
    scores = np.zeros((1, 2), dtype=np.float32)
    tensor = tensor_of(scores)
    assert tensor_of(tensor) is tensor
    scores[0, 1] = 1
    assert tensor.tolist() == [[0, 1]]
