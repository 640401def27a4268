"""Exact softmax attention through PyTorch's FlexAttention: a rule becomes a function of one pair of places.

Shape letters: B batch, S queries, K keys, H heads, G key/value heads, E head width.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from polyformer.errors import SpecError
from polyformer.parts.bias import Bias, ByDistance
from polyformer.parts.contract import Clause, Refuses, Term
from polyformer.parts.kernels.kernel import Context, Kernel
from polyformer.parts.kernels.softmax import SoftmaxPart
from polyformer.parts.part import Part
from polyformer.parts.rules import All, Causal, Everyone, Joined, Nobody, Rule, SameDocument, Window
from polyformer.parts.view import View

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

SIZE = 128
"""Rows of a block, of which those that the rule rules out are skipped: FlexAttention's own default."""

UNTRAINED = "PyTorch's FlexAttention has no backward pass on a CPU; Softmax() and Tiled() have one"

Pairwise = Callable[..., Tensor]
"""(row of the batch, head, query, key), each an integer [], to what is said of them, []; the first query is 0."""


class Flex(Kernel):
    """softmax(scale · q kᵀ + bias) v as one kernel that is written for its rule (Dong et al. 2024).

    The rule becomes a `mask_mod`, and blocks that it rules out are skipped; the score bias becomes a `score_mod`, which
    looks it up by distance, or pair by pair in all of it where it doesn't depend on distances alone.

    The "compiled" form takes a C++ compiler on a CPU, and ten seconds or so at the first pass of each kind; after 8
    kinds PyTorch falls back to the "eager" form, which makes all scores, many times as slowly as `Softmax`. In
    float64 it is always that one. On a CPU, PyTorch has no backward pass for either, and gradients are refused. Other
    devices have not been tested.

    `scale` None is 1/√E. Attention weights can't be dropped.
    """

    scale: float | None = None
    form: Literal["compiled", "eager"] = "compiled"

    def unable(self, see: Rule) -> str:
        odd = next((one for one in _single(see) if not isinstance(one, KNOWN)), None)
        able = ", ".join(kind.__name__ for kind in KNOWN)
        return "" if odd is None else f"it can't make {type(odd).__name__} a function of two places; it knows {able}"

    def breaks(self) -> Mapping[Clause, Term]:
        return {"trained": Refuses(UNTRAINED)}

    def module(self) -> Part:
        return FlexPart(self)


KNOWN = (Everyone, Nobody, Causal, Window, SameDocument)
"""The rules that can be lowered, and what is joined of them."""


class FlexPart(SoftmaxPart):
    """No weights."""

    def __init__(self, spec: Flex) -> None:
        super().__init__(spec, spec.scale, 0.0)
        self.form = spec.form

    def attend(self, qkv: tuple[Tensor, Tensor, Tensor], context: Context) -> Tensor:
        sources = () if context.bias is None else context.bias.sources
        if (
            qkv[0].device.type == "cpu"
            and torch.is_grad_enabled()
            and any(one.requires_grad for one in (*qkv, *sources))
        ):
            raise SpecError(f"Flex can't be trained: {UNTRAINED}")
        if not qkv[0].shape[2] * qkv[1].shape[2]:
            return super().attend(qkv, context)
        form = "eager" if qkv[0].dtype == torch.float64 else self.form
        walk: Callable[..., Tensor] = _flex
        if torch.compiler.is_compiling():  # a decorator would import the compiler wherever parts are imported
            walk = torch.compiler.disable(walk)  # type: ignore[no-untyped-call]
        return walk(qkv, context, self.scale, form)


def _flex(qkv: tuple[Tensor, Tensor, Tensor], context: Context, scale: float | None, form: str) -> Tensor:
    """Return the mixed values [B, H, S, E], by a kernel that is compiled by itself."""
    q, k, v = qkv if torch.is_grad_enabled() else (one.detach() for one in qkv)
    view, rule = context.view, context.rule.here(context.view)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "flex_attention called without torch.compile")
        found: Tensor = _attention(form)(
            q,
            k,
            v,
            score_mod=None if context.bias is None else score_mod(context.bias),
            block_mask=view.once(("flex", rule, len(q)), lambda: block_mask(rule, view, len(q))),
            scale=scale,
            enable_gqa=q.shape[1] != k.shape[1],
        )
    return found


@functools.lru_cache
def _attention(form: str) -> Callable[..., Any]:
    """Return PyTorch's function, which is imported only where it is needed."""
    from torch.nn.attention.flex_attention import flex_attention

    if form == "eager":
        return flex_attention
    return torch.compile(flex_attention)


def _single(rule: Rule) -> list[Rule]:
    """Return what a rule is joined of."""
    return [each for one in rule.rules for each in _single(one)] if isinstance(rule, Joined) else [rule]


def mask_mod(rule: Rule, view: View, batch: int) -> Pairwise:
    """Return whether a query may look at a key that is real."""
    allowed = _lowered(rule, view, batch)
    if view.valid is None:
        return allowed
    valid = _table(view.valid, batch)
    return lambda b, h, i, j: allowed(b, h, i, j) & valid[b, j]


def _lowered(rule: Rule, view: View, batch: int) -> Pairwise:
    """Return whether a query may look at a key."""
    past = torch.tensor(view.keys - view.queries, device=view.device)  # as a number, each would be compiled anew
    if isinstance(rule, Joined):
        join = Tensor.logical_and if isinstance(rule, All) else Tensor.logical_or
        each = [_lowered(one, view, batch) for one in rule.rules]
        return lambda b, h, i, j: functools.reduce(join, [one(b, h, i, j) for one in each])
    if isinstance(rule, Causal):
        return lambda b, h, i, j: j <= i + past
    if isinstance(rule, Window):
        return _near(rule, _apart(view, batch))
    if isinstance(rule, SameDocument) and view.key_documents is not None:
        documents = _table(view.key_documents, batch)
        return lambda b, h, i, j: documents[b, i + past] == documents[b, j]
    everyone = not isinstance(rule, Nobody)
    return lambda b, h, i, j: (j >= 0) if everyone else (j < 0)


def _near(rule: Window, apart: Pairwise) -> Pairwise:
    """Return whether a key is in a query's window; asked for places twice, PyTorch writes wrong C++."""

    def allowed(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        far = apart(b, i, j)
        near = far.abs() <= rule.span
        return near if rule.step == 1 else near & (far % rule.step == 0)

    return allowed


def _apart(view: View, batch: int) -> Pairwise:
    """Return how many places a key stands behind a query (`View.apart`)."""
    past = torch.tensor(view.keys - view.queries, device=view.device)
    if not view.gaps:
        return lambda b, i, j: j - i - past
    places = _table(view.places, batch)
    return lambda b, i, j: places[b, j] - places[b, i + past]


def _table(x: Tensor, batch: int) -> Tensor:
    """Return a fact of all places with a row for each of the batch: [B, K]."""
    return x.expand(batch, -1).contiguous()


def score_mod(bias: Bias) -> Pairwise:
    """Return how a score [] becomes one with its bias."""
    if isinstance(bias, ByDistance) and not bias.view.gaps:
        (table,), apart, least = bias.sources, _apart(bias.view, 1), 1 - bias.view.keys
        return lambda score, b, h, i, j: score + table[h, apart(b, i, j) - least]
    whole = bias.whole()
    rows, heads = whole.shape[:2]
    return lambda score, b, h, i, j: score + whole[b % rows, h % heads, i, j]


def block_mask(rule: Rule, view: View, batch: int) -> BlockMask:
    """Return what FlexAttention goes by: which blocks need a look at each pair, and which are opened as a whole."""
    from torch.nn.attention.flex_attention import BlockMask

    past = view.keys - view.queries
    kinds = torch.zeros(-(-view.queries // SIZE), -(-view.keys // SIZE), dtype=torch.int8)
    for i, at in enumerate(range(past, view.keys, SIZE)):
        queries = range(at, min(at + SIZE, view.keys))
        reach = rule.reach(view, queries)
        for j in range(reach.start // SIZE, -(-reach.stop // SIZE)):
            keys = range(j * SIZE, min((j + 1) * SIZE, view.keys))
            whole = view.valid is None and len(queries) == len(keys) == SIZE and rule.opens(view, queries, keys)
            kinds[i, j] = 2 if whole else 1
    each = []
    for kind in (1, 2):
        here = (kinds == kind).to(view.device)
        each += [here.sum(1), here.int().argsort(dim=1, descending=True, stable=True)]
    counts, blocks, full_counts, full_blocks = (one.int()[None, None] for one in each)
    lengths = (view.queries, view.keys)
    return BlockMask.from_kv_blocks(
        counts, blocks, full_counts, full_blocks, SIZE, mask_mod(rule, view, batch), lengths
    )
