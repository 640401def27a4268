"""Which attentions are measured: a table, one line for each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from polyformer.errors import SpecError, suggest
from polyformer.parts import (
    Causal,
    Context,
    Everyone,
    Kernel,
    LinearAttention,
    Linformer,
    Part,
    Performer,
    Retention,
    Rule,
    Softmax,
    Window,
)
from polyformer.parts.kernels.kernel import KernelPart
from polyformer.spec import Spec

Kind = Literal["dense", "exact", "sparse", "linear", "hashing"]
KINDS: dict[Kind, str] = {
    "dense": "all pairs, through PyTorch's operators",
    "exact": "all pairs, without a matrix of them",
    "sparse": "exactly the pairs of a pattern",
    "linear": "another weighting, linear by design",
    "hashing": "softmax over what hashing finds",
}
"""What a contestant claims to be, in words; all but the last two give what softmax gives under the same rule."""


@dataclass(frozen=True)
class At:
    """What a contestant's spec may depend on: heads, the width of each, all of it together, and the length."""

    heads: int
    head: int
    length: int

    @property
    def width(self) -> int:
        return self.heads * self.head


@dataclass(frozen=True)
class Contestant:
    """One attention that is measured.

    Attributes:
        kind: what it claims to be.
        make: gives its spec, a kernel or an op of its own.
        pattern: the name of its rule in `PATTERNS`.
        linear: the length from which on it claims to cost linear time and memory; None makes no such claim.
        holds: what it holds of S · K, which is worked out before it is tried.
    """

    name: str
    kind: Kind
    make: Callable[[At], Spec]
    pattern: str
    linear: int | None = None
    holds: Literal["nothing", "a mask", "all scores"] = "nothing"

    @property
    def rule(self) -> Rule:
        """Who may look at whom."""
        return PATTERNS[self.pattern]

    @property
    def dense(self) -> str:
        """The name of the contestant that is `scaled_dot_product_attention` under the same rule."""
        return DENSE if self.pattern == "causal" else f"{DENSE}-{self.pattern}"

    def square(self, length: int, scores: int) -> int:
        """Return the bytes of what it holds of S · K, of `scores` matrices for all heads and sequences together."""
        pairs = length * length
        masks = 5 * pairs  # a boolean one, and what PyTorch makes of it: numbers that are added to the scores
        return {"nothing": 0, "a mask": masks, "all scores": pairs + 8 * scores * pairs}[self.holds]


class Naive(Kernel):
    """Softmax as the textbook has it: the matrix of all scores is made, masked, and multiplied."""

    def module(self) -> Part:
        return NaivePart(self)


class NaivePart(KernelPart):
    """Holds two matrices [B, H, S, K] at a time."""

    def attend(self, qkv: tuple[Tensor, Tensor, Tensor], context: Context) -> Tensor:
        q, k, v = qkv
        scores = (q * q.shape[-1] ** -0.5) @ k.mT
        allowed = context.rule.allowed(context.view)
        if allowed is not None:
            scores = scores.masked_fill(~allowed[:, None], float("-inf"))
        return torch.softmax(scores, -1) @ v


DENSE = "sdpa"
"""What all are compared with: PyTorch's own attention, causal, which needs no mask."""

PATTERNS: dict[str, Rule] = {
    "causal": Causal(),
    "everyone": Everyone(),
    "window-256": Causal() & Window(256),
}

MEASURED: tuple[Contestant, ...] = (
    Contestant("naive", "dense", lambda at: Naive(), "causal", holds="all scores"),
    Contestant("linear-attention", "linear", lambda at: LinearAttention(), "causal", linear=1024),
    Contestant("performer", "linear", lambda at: Performer(at.head), "causal", linear=1024),
    Contestant(
        "retention", "linear", lambda at: Retention.of_width(at.width, at.heads, Causal(), at.width), "causal", 1024
    ),
    Contestant("linformer", "linear", lambda at: Linformer(at.length, 256), "everyone", linear=1024),
)
"""Linear ones at their papers' sizes: 256 random features, 256 mixtures of keys, chunks of 64 rows. Retention's values
are as wide as its keys here, so that all have one size."""


def _softmax(pattern: str) -> Contestant:
    """Return PyTorch's attention under a pattern; beyond the plain ones it takes a mask of all pairs."""
    name = DENSE if pattern == "causal" else f"{DENSE}-{pattern}"
    holds: Literal["nothing", "a mask"] = "nothing" if pattern in ("causal", "everyone") else "a mask"
    return Contestant(name, "dense", lambda at: Softmax(), pattern, holds=holds)


CONTESTANTS: dict[str, Contestant] = {one.name: one for one in (*map(_softmax, PATTERNS), *MEASURED)}
"""By name: PyTorch's attention under every pattern, and what is measured beside it."""


def chosen(names: Sequence[str]) -> list[Contestant]:
    """Return the contestants of these names, and before them the dense ones that they are compared with; all if none.

    Raises:
        SpecError: no contestant has such a name; the nearest is told.
    """
    for name in names:
        if name not in CONTESTANTS:
            raise SpecError(f"there is no attention '{name}' to measure{suggest(name, CONTESTANTS)}")
    wanted = {DENSE, *names, *(CONTESTANTS[name].dense for name in names)}
    return [one for one in CONTESTANTS.values() if not names or one.name in wanted]
