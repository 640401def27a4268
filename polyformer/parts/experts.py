"""Mixture of experts: of many feed-forward networks, a router chooses a few for each row.

Shape letters: B batch, S length, D width, N rows (B·S), E experts, C experts chosen for a row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from polyformer.errors import SpecError
from polyformer.parts.contract import Clause, Differs, Term
from polyformer.parts.flow import Trace
from polyformer.parts.linear import Affine, Linear
from polyformer.parts.part import Part, Slotted
from polyformer.spec import Record, Spec

if TYPE_CHECKING:
    from torch import nn

    from polyformer.parts.flow import Flow


class RouterLosses(Record):
    """How much the losses of a router count in training, beside those of the tokens.

    `balance` weighs `Routing.balance`, which keeps all experts in use (0.01: Fedus et al. 2022, section 2.2), and
    `magnitude` `Routing.magnitude`, which keeps scores small (0.001: Zoph et al. 2022, section 3.1).

    The layers of a stack give the mean of their losses. With `over` "all layers", they give one loss of all their rows,
    as in the reference library: what one layer neglects, another may then make up for.
    """

    balance: float = 0.01
    magnitude: float = 0.001
    over: Literal["each layer", "all layers"] = "each layer"

    def check(self) -> None:
        self.require(min(self.balance, self.magnitude) >= 0, "balance and magnitude can't be negative")

    def of(self, layers: Sequence[Routing]) -> Tensor:
        """Return the weighed sum for the layers of one stack."""
        found = [Routing.joined(layers)] if self.over == "all layers" else layers
        each = [self.balance * one.balance() + self.magnitude * one.magnitude() for one in found]
        return torch.stack(each).mean()


class Experts(Spec):
    """The sum of what the `chosen` best experts make of a row, each weighed by its probability (Shazeer et al. 2017).

    `weights` are the probabilities among all experts, so that they add up to less than 1 (Switch: Fedus et al. 2022;
    Qwen2-MoE), or among the chosen ones only (Mixtral: Jiang et al. 2024). Of one sequence, an expert takes at most
    `capacity` real rows, the first ones; the others get nothing from it (Fedus et al. 2022, section 2.2). `jitter`
    multiplies what the router sees by 1 ± jitter in training. `losses` are those of its router (None: it has none).
    """

    router: Spec
    experts: tuple[Spec, ...]
    chosen: int = 1
    weights: Literal["all", "chosen"] = "chosen"
    capacity: int | None = None
    jitter: float = 0.0
    losses: RouterLosses | None = None

    def check(self) -> None:
        count = len(self.experts)
        self.require(0 < self.chosen <= count, f"{self.chosen} of {count} experts can't be chosen")
        self.require(self.capacity is None or self.capacity > 0, "capacity must be at least 1")
        self.require(0 <= self.jitter < 1, f"jitter must be in [0, 1), not {self.jitter}")
        if isinstance(self.router, Affine):
            self.require(self.router.outputs == count, f"a router to {self.router.outputs} has {count} experts")

    def breaks(self) -> Mapping[Clause, Term]:
        if self.capacity is None:
            return {}
        return {
            "cached": Differs("an expert's capacity is that of one pass; the rows before it are not counted"),
            "packed": Differs("an expert's capacity is that of a row of the batch, which documents share"),
        }

    @classmethod
    def of(cls, expert: Spec, width: int, count: int, chosen: int) -> Experts:
        """Return `count` experts of one kind for rows of `width`, with a plain router."""
        return cls(Linear(width, count, bias=False), (expert,) * count, chosen)

    def module(self) -> Part:
        return ExpertsPart(self)


class Gated(Spec):
    """sigmoid(gate(x)) · op(x): an expert that every row goes through, in its own measure (Qwen2-MoE).

    It stands beside the routed ones: `Branches((Experts(...), Gated(op, Linear(width, 1))))`.
    """

    op: Spec
    gate: Spec

    def module(self) -> Part:
        return GatedPart(self)


@dataclass
class Routing:
    """How one layer shared its rows out.

    Attributes:
        scores: the router's, before the softmax [N, E]; differentiable.
        experts: the chosen ones [N, C].
        real: boolean [N], False for padding; None if all rows are real.
        losses: how much the layer's losses count; None if it has none.
    """

    scores: Tensor
    experts: Tensor
    real: Tensor | None = None
    losses: RouterLosses | None = None

    @classmethod
    def joined(cls, layers: Sequence[Routing]) -> Routing:
        """Return the rows of several layers as if they were one's; raises `SpecError` for other numbers of experts."""
        counts = sorted({one.scores.shape[1] for one in layers})
        if len(counts) > 1:
            raise SpecError(
                f"layers of {counts[0]} and of {counts[1]} experts have no loss in common; take each layer's"
            )
        real = [
            one.scores.new_ones(len(one.scores), dtype=torch.bool) if one.real is None else one.real for one in layers
        ]
        scores, experts = (torch.cat([getattr(one, name) for one in layers]) for name in ("scores", "experts"))
        return cls(scores, experts, torch.cat(real))

    def balance(self) -> Tensor:
        """Return the load-balancing loss E · Σₑ fₑ · pₑ (Fedus et al. 2022, equations 4–6), C where it is balanced.

        fₑ is how many of a row's C choices fall on the expert e, pₑ its probability, both in the mean of real rows.
        """
        rows, count = self.scores.shape
        real = self.scores.new_ones(rows) if self.real is None else self.real
        share = real.float() / real.sum().clamp(min=1)
        load = share @ F.one_hot(self.experts, count).sum(1).float()
        return count * (load * (share @ self.scores.float().softmax(-1))).sum()

    def magnitude(self) -> Tensor:
        """Return the router z-loss, the mean over real rows of log² Σ exp(scores) (Zoph et al. 2022, equation 5)."""
        squares = self.scores.float().logsumexp(-1).square()
        return squares.mean() if self.real is None else (squares * self.real).sum() / self.real.sum().clamp(min=1)


def routing_trace(model: nn.Module) -> Trace | None:
    """Return what a training step gives to the passes of a model whose routers have losses; None for other models."""
    parts = model.modules()
    wanted = any(isinstance(part, ExpertsPart) and part.losses is not None for part in parts)
    return Trace(wants=frozenset(("routing",))) if wanted else None


def routing_loss(trace: Trace) -> Tensor:
    """Return the weighed losses of all routers that wrote into a trace: the sum over its stacks, differentiable."""
    stacks: dict[tuple[str, RouterLosses], list[Routing]] = {}
    for slot, routing in trace.routing.items():
        if routing.losses is not None:
            stacks.setdefault((slot.partition(".")[0], routing.losses), []).append(routing)
    return sum((losses.of(layers) for (_, losses), layers in stacks.items()), start=torch.zeros(()))


class ExpertsPart(Slotted):
    """x [B, S, D] -> [B, S, D]. Rows are sorted by expert, so that each expert runs once, on all of its rows."""

    router: Part
    experts: nn.ModuleList

    def __init__(self, spec: Experts) -> None:
        super().__init__(spec)
        self.chosen, self.weights, self.capacity, self.jitter = spec.chosen, spec.weights, spec.capacity, spec.jitter
        self.losses = spec.losses

    def forward(self, x: Tensor, flow: Flow) -> Tensor:
        if len(flow.mixes()) > 1:  # rows that are sorted by expert can't be told by their adapters
            return flow.apart(self._shared_out, x)
        return self._shared_out(x, flow)

    def _shared_out(self, x: Tensor, flow: Flow) -> Tensor:
        weights, experts = self._route(x, flow)
        rows = x.flatten(0, -2)
        order = experts.flatten().argsort(stable=True)
        sizes = experts.flatten().bincount(minlength=len(self.experts)).tolist()
        pieces = torch.split(rows[order // self.chosen], sizes)
        made = [expert(piece, flow) for expert, piece in zip(self.experts, pieces, strict=True) if len(piece)]
        if not made:
            return x
        by_row = torch.cat(made)[order.argsort()].view(len(rows), self.chosen, -1)
        return (by_row * weights.to(by_row.dtype)[..., None]).sum(1).view_as(x)

    def _route(self, x: Tensor, flow: Flow) -> tuple[Tensor, Tensor]:
        """Return the weights of the chosen experts and their numbers, each [N, C]."""
        seen = x
        if self.training and self.jitter:
            seen = x * torch.empty_like(x).uniform_(1 - self.jitter, 1 + self.jitter)
        scores = self.router(seen, flow).flatten(0, -2)
        wide = torch.promote_types(scores.dtype, torch.float32)
        weights, experts = scores.softmax(-1, dtype=wide).topk(self.chosen)
        if self.weights == "chosen":
            weights = weights / weights.sum(-1, keepdim=True)
        real = flow.rows_valid
        if self.capacity is not None:
            choices = experts.view(*x.shape[:2], self.chosen)
            weights = weights * flow.apart(self._within, choices).view_as(weights)
        if flow.trace is not None and "routing" in flow.trace.wants:
            rows_real = None if real is None else real.flatten()
            flow.trace.routing[flow.path + self.slot] = Routing(scores, experts, rows_real, self.losses)
        return weights, experts

    def _within(self, experts_BSC: Tensor, flow: Flow) -> Tensor:
        """Tell which choices are among the first `capacity` of their expert in their sequence: boolean [B, S, C]."""
        choices, real = F.one_hot(experts_BSC, len(self.experts)).sum(2), flow.rows_valid
        if real is not None:
            choices = choices * real[..., None]
        assert self.capacity is not None
        return choices.cumsum(1).gather(2, experts_BSC) <= self.capacity


class GatedPart(Part):
    """x [..., D] -> the same shape."""

    op: Part
    gate: Part

    def forward(self, x: Tensor, flow: Flow) -> Tensor:
        return torch.sigmoid(self.gate(x, flow)) * self.op(x, flow)
