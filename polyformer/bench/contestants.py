"""Which attentions are measured: a table, one line for each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from polyformer.errors import SpecError, suggest
from polyformer.parts import (
    AttentionFree,
    BlockSparse,
    BlockWindow,
    Causal,
    Chunks,
    Context,
    Edges,
    Everyone,
    Flex,
    Hashes,
    Hashing,
    Heads,
    Kernel,
    LinearAttention,
    Linformer,
    Local,
    Part,
    Performer,
    RandomBlocks,
    Retention,
    Rule,
    Sliding,
    Softmax,
    Tiled,
    Window,
)
from polyformer.parts.kernels.kernel import KernelPart, dense_weights
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

    def rule(self, at: At) -> Rule:
        """Return who may look at whom."""
        return PATTERNS[self.pattern](at)

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
        return dense_weights((q * q.shape[-1] ** -0.5) @ k.mT, context) @ v


def _retention(at: At) -> Spec:
    return Retention.of_width(at.width, at.heads, Causal(), at.width)


def _hashing(at: At) -> Spec:
    return Hashing.of_width(at.width, Heads(at.heads, at.heads, at.head), Chunks(64), Causal(), Hashes(4, seed=0))


DENSE = "sdpa"
"""What all are compared with: PyTorch's own attention, causal, which needs no mask."""

PATTERNS: dict[str, Callable[[At], Rule]] = {
    "causal": lambda at: Causal(),
    "everyone": lambda at: Everyone(),
    "window-256": lambda at: Causal() & Window(256),
    "dilated-256": lambda at: Causal() & Window(256, 4),
    "chunks-64": lambda at: Causal() & BlockWindow(64, 1),
    "longformer": lambda at: Window(257) | Edges(1, 1, 0),
    "bigbird": lambda at: BlockWindow(64) | Edges(64) | RandomBlocks(64, 3, at.heads),
}
"""By name. Longformer's windows are of 512 tokens, half to either side, and here one token is global; BigBird's blocks
are of 64 tokens, and each looks at itself and its neighbours, the first and the last, and 3 that its head draws."""

MEASURED: tuple[Contestant, ...] = (
    Contestant("naive", "dense", lambda at: Naive(), "causal", holds="all scores"),
    Contestant("tiled", "exact", lambda at: Tiled(), "causal"),
    Contestant("sliding-256", "sparse", lambda at: Sliding(), "window-256", linear=1024),
    Contestant("sliding-dilated", "sparse", lambda at: Sliding(), "dilated-256", linear=4096),
    Contestant("blocks-window-256", "sparse", lambda at: BlockSparse(), "window-256", linear=1024),
    Contestant("blocks-longformer", "sparse", lambda at: BlockSparse(), "longformer", linear=1024),
    Contestant("blocks-bigbird", "sparse", lambda at: BlockSparse(), "bigbird", linear=1024),
    Contestant("flex", "exact", lambda at: Flex(), "causal"),
    Contestant("local", "sparse", lambda at: Local(Chunks(64)), "chunks-64", linear=1024),
    Contestant("linear-attention", "linear", lambda at: LinearAttention(), "causal", linear=1024),
    Contestant("performer", "linear", lambda at: Performer(at.head), "causal", linear=1024),
    Contestant("retention", "linear", _retention, "causal", linear=1024),
    Contestant("attention-free", "linear", lambda at: AttentionFree(), "causal", linear=1024),
    Contestant("linformer", "linear", lambda at: Linformer(at.length, 256), "everyone", linear=1024),
    Contestant("hashing", "hashing", _hashing, "causal"),
)
"""Linear ones at their papers' sizes: 256 random features, 256 mixtures of keys, chunks of 64 rows. Retention's values
are as wide as its keys here, so that all have one size. Hashing takes 4 rounds."""


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
