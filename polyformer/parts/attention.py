"""Attention: projections, heads, the cache, and a call to the kernel.

Shape letters: B batch, S query length, K key length, D width, H heads, G key/value heads, E head width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from polyformer.errors import SpecError
from polyformer.parts.contract import Clause, Term
from polyformer.parts.kernels.kernel import Context, Kernel, KernelPart
from polyformer.parts.kernels.softmax import Softmax
from polyformer.parts.linear import Affine, Linear
from polyformer.parts.norms import Norm
from polyformer.parts.part import Part, Slotted
from polyformer.parts.relative import RelativePart, RelativePosition
from polyformer.parts.rules import Everyone, Rule
from polyformer.spec import Record, Spec

if TYPE_CHECKING:
    from polyformer.parts.flow import Flow


class Heads(Record):
    """How a width is cut into heads: `count` for queries, `groups` for keys and values, each `width` wide.

    groups == count is multi-head attention, 1 multi-query (Shazeer 2019), between them grouped-query (Ainslie et
    al. 2023).
    """

    count: int
    groups: int
    width: int

    def check(self) -> None:
        self.require(min(self.count, self.groups, self.width) > 0, "count, groups and width must be at least 1")
        fits = self.count % self.groups == 0
        self.require(fits, f"{self.count} heads can't share {self.groups} key/value heads evenly")

    @property
    def shares(self) -> list[int]:
        """How wide all queries, all keys and all values of a row are."""
        shared = self.groups * self.width
        return [self.count * self.width, shared, shared]

    @classmethod
    def of_width(cls, width: int, count: int, groups: int | None = None) -> Heads:
        """Cut a model's width into `count` heads; raises `SpecError` when that leaves a remainder."""
        if count < 1 or width % count:
            raise SpecError(f"a width of {width} can't be cut into {count} heads evenly")
        return cls(count, groups or count, width // count)


class Attention(Spec):
    """Self-attention: o(kernel(q(x), k(x), v(x))) under the rule `see`, which knows order by `position`.

    With `qkv`, one matrix makes queries, keys and values, one behind the other in each row; q, k and v are what is
    still done to each (`Identity`, a norm).
    """

    q: Spec
    k: Spec
    v: Spec
    o: Spec
    heads: Heads
    see: Rule = Everyone()
    kernel: Kernel = Softmax()
    position: RelativePosition | None = None
    qkv: Spec | None = None

    def check(self) -> None:
        _check_sizes(self)
        if isinstance(self.qkv, Linear):
            width = sum(self.heads.shares)
            told = f"qkv gives {self.qkv.outputs} values, but queries, keys and values make {width}"
            self.require(self.qkv.outputs == width, told)
        _check_kernel(self, self.see)

    def breaks(self) -> Mapping[Clause, Term]:
        return self.see.breaks()

    @classmethod
    def of_width(cls, width: int, heads: int, see: Rule, bias: bool = True) -> Attention:
        """Return plain multi-head attention of a model's width."""
        return cls.of_heads(width, Heads.of_width(width, heads), see, bias, bias)

    @classmethod
    def of_heads(cls, width: int, heads: Heads, see: Rule, bias: bool = False, out_bias: bool = False) -> Attention:
        """Return attention whose heads, fewer for keys and values perhaps, need not make up the model's width."""
        whole, shared = heads.count * heads.width, heads.groups * heads.width
        k = Linear(width, shared, bias)
        return cls(Linear(width, whole, bias), k, k, Linear(whole, width, out_bias), heads, see)

    def module(self) -> Part:
        return AttentionPart(self)


class PerHead(Spec):
    """A norm within each head, behind a projection to queries or keys (QK-norm: Henry et al. 2020; Qwen3).

    `q=Chain((Linear(...), PerHead(RMSNorm(head_width))))`; a norm over all heads at once (OLMo 2) needs no `PerHead`.
    """

    norm: Norm

    def module(self) -> Part:
        return PerHeadPart(self)


class CrossAttention(Spec):
    """Attention of a decoder's rows to the encoder's output: queries from x, keys and values from the memory."""

    q: Spec
    k: Spec
    v: Spec
    o: Spec
    heads: Heads
    kernel: Kernel = Softmax()

    def check(self) -> None:
        _check_sizes(self)
        _check_kernel(self, Everyone())
        why = self.kernel.unable_across()
        self.require(not why, f"{type(self.kernel).__name__} can't look at an encoder's output: {why}")

    @classmethod
    def of_width(cls, width: int, heads: int, bias: bool = True) -> CrossAttention:
        """Return plain multi-head cross-attention of a model's width."""
        linear = Linear(width, width, bias)
        return cls(linear, linear, linear, linear, Heads.of_width(width, heads))

    def module(self) -> Part:
        return CrossAttentionPart(self)


def _check_sizes(spec: Attention | CrossAttention) -> None:
    """Refuse plain matrices that don't fit the heads; what has taken a matrix's place is trusted."""
    heads = spec.heads
    for name, count in (("q", heads.count), ("k", heads.groups), ("v", heads.groups), ("o", heads.count)):
        linear = getattr(spec, name)
        if isinstance(linear, Affine):
            size, does = (linear.inputs, "takes") if name == "o" else (linear.outputs, "gives")
            told = f"{name} {does} {size} values, but {count} heads of width {heads.width} make {count * heads.width}"
            spec.require(size == count * heads.width, told)


def _check_kernel(spec: Attention | CrossAttention, see: Rule) -> None:
    why = spec.kernel.unable(see)
    spec.require(not why, f"{type(spec.kernel).__name__} can't follow {see}: {why}")


class Projected(Slotted):
    """What both attentions share: projections, heads, and the call to the kernel."""

    q: Part
    k: Part
    v: Part
    o: Part
    kernel: KernelPart

    def __init__(self, spec: Attention | CrossAttention) -> None:
        super().__init__(spec)
        self.heads = spec.heads

    def split(self, x: Tensor, count: int) -> Tensor:
        """[B, S, count·E] -> [B, count, S, E]."""
        return x.view(*x.shape[:2], count, self.heads.width).transpose(1, 2)

    def finish(self, qkv: tuple[Tensor, Tensor, Tensor], context: Context, flow: Flow) -> Tensor:
        """Attend and return the heads side by side: [B, S, H·E]."""
        if flow.trace is not None and "attention" in flow.trace.wants:
            flow.trace.attention[flow.path + self.slot] = self.kernel.weights(qkv[0], qkv[1], context).detach()
        mixed = self.kernel.attend(qkv, context)
        return mixed.transpose(1, 2).flatten(2)


class AttentionPart(Projected):
    """x [B, S, D] -> [B, S, D]."""

    position: RelativePart | None
    qkv: Part | None

    def __init__(self, spec: Attention) -> None:
        super().__init__(spec)
        self.see, self.settled = spec.see, spec.see.settled()

    def forward(self, x: Tensor, flow: Flow) -> Tensor:
        for part in (self, self.kernel, self.position):
            if part is not None:
                part.agree(flow)
        x_q, x_k, x_v = (x, x, x) if self.qkv is None else torch.split(self.qkv(x, flow), self.heads.shares, -1)
        q = self.split(self.q(x_q, flow), self.heads.count)
        k = self.split(self.k(x_k, flow), self.heads.groups)
        v = self.split(self.v(x_v, flow), self.heads.groups)
        if self.position is not None:
            q, k = self.position.ask(q, flow), self.position.turn(k, flow)
        return self.o(flow.apart(self._attend, q, k, v), flow)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, flow: Flow) -> Tensor:
        """Return the heads side by side [B, S, H·E] for new rows, which look at those in the cache too."""
        bias = None if self.position is None else self.position.bias(q, flow)
        see = self.see if self.training else self.settled
        context = Context(see, flow.view, bias, flow.cache, flow.path + self.slot)
        k, v = self.kernel.recall((k, v), context)
        return self.finish((q, k, v), context.held(), flow)


class CrossAttentionPart(Projected):
    """x [B, S, D] -> [B, S, D], looking at `flow.memory` [B', T, D].

    When several hypotheses share a sentence (B a multiple of B'), they ask its one set of keys together: the
    hypotheses become further queries, and nothing of the memory is copied.
    """

    def forward(self, x: Tensor, flow: Flow) -> Tensor:
        return self.o(flow.apart(self._ask, self.q(x, flow)), flow)

    def _ask(self, q: Tensor, flow: Flow) -> Tensor:
        """Return the heads side by side for queries, each [B, S, H·E]."""
        memory, view = flow.memory, flow.memory_view
        if memory is None or view is None:
            raise SpecError("cross-attention needs an encoder's output; this flow carries none")

        def make() -> tuple[Tensor, Tensor]:
            groups = self.heads.groups
            return self.split(self.k(memory, flow), groups), self.split(self.v(memory, flow), groups)

        k, v = make() if flow.cache is None else flow.cache.memory(flow.path + self.slot, make)
        batch, length, _ = q.shape
        rows = k.shape[0]
        if batch % rows:
            raise SpecError(f"{batch} rows can't share the encoder's output of {rows} sentences evenly")
        q = self.split(q.view(rows, batch // rows * length, q.shape[-1]), self.heads.count)
        mixed = self.finish((q, k, v), Context(Everyone(), view), flow)
        return mixed.view(batch, length, mixed.shape[-1])


class PerHeadPart(Part):
    """x [..., heads · E] -> the same shape."""

    norm: Part

    def __init__(self, spec: PerHead) -> None:
        super().__init__(spec)
        self.width = spec.norm.width

    def forward(self, x: Tensor, flow: Flow) -> Tensor:
        return self.norm(torch.unflatten(x, -1, (-1, self.width)), flow).flatten(-2)
