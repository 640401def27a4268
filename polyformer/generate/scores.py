"""Scores of next tokens, in PyTorch's tensors or, where a model runs natively, in NumPy's arrays: what both are asked.

Greedy writing asks no more than this, so that a native model writes without PyTorch. Whatever shapes scores or draws
by them works on tensors (`tensor_of`), the same for both.

Shape letters: W rows, V vocabulary.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from torch import Tensor

    Scores: TypeAlias = Tensor | npt.NDArray[np.float32]
    """Scores in float32, and what is made of them row by row."""
    Ids: TypeAlias = Tensor | npt.NDArray[np.int64]


def tensor_of(scores: Scores | Ids) -> Tensor:
    """Return scores, or ids, as a tensor; an array's memory is shared."""
    if not isinstance(scores, np.ndarray):
        return scores
    import torch

    return torch.from_numpy(scores)


def log_sums(scores: Scores) -> Scores:
    """Return the logarithm of the sum of the exponentials of each row [W]; no number where a row has none."""
    if not isinstance(scores, np.ndarray):
        return scores.logsumexp(-1)
    with np.errstate(all="ignore"):
        highest = scores.max(-1, keepdims=True)
        sums = np.exp(scores - highest).sum(-1, dtype=np.float64)
        return cast("npt.NDArray[np.float32]", np.log(sums).astype(np.float32) + highest[:, 0])


def finite(numbers: Scores) -> list[bool]:
    """Tell which of several numbers are finite."""
    listed: list[float] = numbers.tolist()
    return [math.isfinite(one) for one in listed]


def likeliest(scores: Scores, count: int) -> tuple[tuple[int, float], ...]:
    """Return the ids and scores of the `count` highest of a row [V], in order."""
    if not isinstance(scores, np.ndarray):
        values, ids = scores.topk(min(count, len(scores)))
        return tuple(zip(ids.tolist(), values.tolist(), strict=True))
    count = min(count, len(scores))
    least = np.partition(scores, -count)[-count]
    among: npt.NDArray[Any] = np.flatnonzero(scores >= least)
    found = among[np.argsort(-scores[among], kind="stable")][:count]
    return tuple(zip(found.tolist(), scores[found].tolist(), strict=True))
