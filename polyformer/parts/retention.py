"""RetNet's retention, which reads a text like attention and writes it like a recurrent network.

Shape letters: B batch, S length, D width, H heads, E width of a head's queries and keys, V width of its values.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from polyformer.errors import SpecError
from polyformer.parts.attention import PerHead
from polyformer.parts.contract import Clause, Term
from polyformer.parts.kernels.kernel import Context, beyond, rules_of
from polyformer.parts.kernels.sums import CHUNK, Terms, weighted_sums
from polyformer.parts.linear import Affine, Linear
from polyformer.parts.norms import LayerNorm
from polyformer.parts.part import Part, Slotted
from polyformer.parts.relative import RelativePart
from polyformer.parts.rotary import Rotary
from polyformer.parts.rules import Causal, Rule, SameDocument
from polyformer.spec import Spec

if TYPE_CHECKING:
    from polyformer.parts.flow import Flow


class Retention(Spec):
    """Gated multi-scale retention: o(swish(gate(x)) · norm(R)) (Sun et al. 2023, section 2.2).

    A head's R is Σ γ^(n - m) (q_n · k_m / √E) v_m over the rows m up to n, with the decay γ of that head; there are as
    many heads as `decays`. `position` turns q and k, which with γ makes the paper's xPos, (γ e^{iθ})^n. `norm` stands
    behind each head by itself (the paper's GroupNorm). It takes the scale of R away, so that the paper's score
    normalisation, which divides each of its rows by a number, is left out: that is for half precision, and sums are
    made in float32 here.

    The three forms of the paper are one: rows are worked out all against all within a chunk (parallel), and what lies
    before it is one state (recurrent). So `chunk` changes the cost only: as long as the text it is the parallel form, 1
    the recurrent one, between them the chunkwise. A cache holds the state, and nothing else.
    """

    q: Spec
    k: Spec
    v: Spec
    gate: Spec
    o: Spec
    norm: Spec
    decays: tuple[float, ...]
    position: Rotary | None = None
    see: Rule = Causal()
    chunk: int = CHUNK

    def check(self) -> None:
        self.require(self.chunk > 0, f"chunk must be at least 1, not {self.chunk}")
        self.require(len(self.decays) > 0, "needs a decay for each of its heads")
        self.require(all(0 < one < 1 for one in self.decays), f"decays must be between 0 and 1, not {self.decays}")
        odd = beyond(self.see, Causal, SameDocument)
        self.require(not odd, odd)
        self.require(Causal() in rules_of(self.see), "is causal, so it must see Causal()")
        for names in (("q", "k"), ("v", "gate", "o")):
            plain = {name: one for name in names if isinstance(one := getattr(self, name), Affine)}
            sizes = {one.inputs if name == "o" else one.outputs for name, one in plain.items()}
            fits = len(sizes) < 2 and all(size % len(self.decays) == 0 for size in sizes)
            told = f"{len(self.decays)} heads must be able to share as many values of {', '.join(names)} evenly"
            self.require(fits, f"{told}, not {sorted(sizes)}")

    def breaks(self) -> Mapping[Clause, Term]:
        return self.see.breaks()

    @classmethod
    def of_width(cls, width: int, heads: int, see: Rule, values: int | None = None) -> Retention:
        """Return the published form for a model's width.

        Args:
            heads: each `width` / `heads` wide, which must be even; their decays are 1 - 2^-5, 1 - 2^-6 …
            see: `Causal() & SameDocument()` where documents are packed.
            values: the width of all heads' values; None is 2 · width.
        """
        inner = 2 * width if values is None else values
        if heads < 1 or width % (2 * heads) or inner % heads:
            raise SpecError(f"widths of {width} and {inner} can't be cut into {heads} heads of even width")
        score, value = Linear(width, width, bias=False), Linear(width, inner, bias=False)
        return cls(
            q=score,
            k=score,
            v=value,
            gate=value,
            o=Linear(inner, width, bias=False),
            norm=PerHead(LayerNorm(inner // heads, gain=False, bias=False)),
            decays=tuple(1 - 2.0 ** -(5 + head) for head in range(heads)),
            position=Rotary(width // heads, layout="interleaved"),
            see=see,
        )

    def module(self) -> Part:
        return RetentionPart(self)


class RetentionPart(Slotted):
    """x [B, S, D] -> [B, S, D]."""

    q: Part
    k: Part
    v: Part
    gate: Part
    o: Part
    norm: Part
    position: RelativePart | None

    def __init__(self, spec: Retention) -> None:
        super().__init__(spec)
        self.see, self.chunk = spec.see, spec.chunk
        self.rates = [-math.log(decay) for decay in spec.decays]

    def forward(self, x: Tensor, flow: Flow) -> Tensor:
        self.agree(flow)
        q, k, v = (self._split(part(x, flow)) for part in (self.q, self.k, self.v))
        if self.position is not None:
            q, k = self.position.turn(q, flow), self.position.turn(k, flow)
        retained = self.norm(flow.apart(self._retain, q, k, v).transpose(1, 2).flatten(2), flow)
        return self.o(F.silu(self.gate(x, flow)) * retained, flow)

    def _retain(self, q: Tensor, k: Tensor, v: Tensor, flow: Flow) -> Tensor:
        """Return R [B, H, S, V]."""
        context = Context(self.see, flow.view, None, flow.cache, flow.path + self.slot)
        with torch.autocast(q.device.type, enabled=False):
            wide = torch.promote_types(q.dtype, torch.float32)
            rate = torch.tensor(self.rates, dtype=wide, device=q.device)
            levels = _counted(flow).to(wide)
            terms = Terms(lambda x, at: (x, levels[..., at]), "Retention", self.chunk, rate)
            qkv = (q.to(wide), k.to(wide) * q.shape[-1] ** -0.5, v.to(wide))
            return weighted_sums(qkv, terms, context).to(v.dtype)

    def _split(self, x: Tensor) -> Tensor:
        """[B, S, H·E] -> [B, H, S, E]."""
        return torch.unflatten(x, -1, (len(self.rates), -1)).transpose(1, 2)


def _counted(flow: Flow) -> Tensor:
    """Number the new rows by the real ones of their whole row: [b, 1, S].

    Levels must never fall, so that a row's own is the highest which it sees: documents don't begin anew here.
    """
    view = flow.view
    past = view.keys - view.queries
    if view.valid is None:
        return torch.arange(past, view.keys, device=view.device)[None, None]
    return (view.valid.long().cumsum(1) - 1).clamp(min=0)[:, None, past:]
