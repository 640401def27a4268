"""Reversible residual layers: the backward pass works each layer's input out of its output, so that none is kept.

Shape letters: B batch, S length, D width.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import get_device_states, set_device_states

from polyformer.parts.contract import Within, contract_of
from polyformer.parts.flow import Flow
from polyformer.parts.part import Part, name_slots
from polyformer.spec import Spec

Pair = tuple[Tensor, Tensor]


class Coupling(Spec):
    """y₁ = x₁ + f(x₂) and y₂ = x₂ + g(y₁) on the halves of each row, so that x₂ = y₂ - g(y₁) and x₁ = y₁ - f(x₂).

    Gomez et al. 2017, section 3.1. In Reformer, f is attention and g the feed-forward network, each behind its norm
    (Kitaev et al. 2020, section 3).
    """

    f: Spec
    g: Spec

    def module(self) -> Part:
        return CouplingPart(self)


class Reversible(Spec):
    """A stack of couplings that keeps the rows behind its last block only: memory does not grow with the depth.

    In the backward pass each block's input is worked out of its output, and what is inside of the block is made again,
    one f or g at a time (Gomez et al. 2017, algorithm 1), under the random state that it was made under, so that
    dropout drops the same. The price is a second forward pass, and inputs that are true to rounding only, so that a
    part is held to what it chose the first time (`Flow.choose`), as `Hashing` to its buckets.

    Rows enter as both halves, [x; x], and leave as [y₁; y₂], which is twice as wide and what `norm` is given, as in
    Reformer (Kitaev et al. 2020). A pass that reads from a cache, or that writes down a routing, whose losses need its
    graph, is differentiated in the plain way.

    Raises:
        SpecError: a part within that can't be walked a second time, as one that counts how often it was.
    """

    blocks: tuple[Coupling, ...]
    norm: Spec | None = None

    def check(self) -> None:
        self.require(len(self.blocks) > 0, "needs at least one block")
        for block in self.blocks:
            clash = contract_of(block).get("checkpointed")
            if clash is not None and not isinstance(clash.term, Within):
                self.require(False, f"{clash.part} can't be walked a second time: {clash.term.why}")

    def module(self) -> Part:
        return ReversiblePart(self)


class CouplingPart(Part):
    """[x₁; x₂] [B, S, 2·D] -> [y₁; y₂], the same shape."""

    f: Part
    g: Part

    def forward(self, x: Tensor, flow: Flow) -> Tensor:
        first, second = x.chunk(2, -1)
        first = first + self.f(second, flow)
        return torch.cat((first, second + self.g(first, flow)), -1)


class ReversiblePart(Part):
    """x [B, S, D] -> [B, S, 2·D]."""

    blocks: nn.ModuleList
    norm: Part | None

    def __init__(self, spec: Reversible) -> None:
        super().__init__(spec)
        name_slots(self.blocks)

    def forward(self, x: Tensor, flow: Flow) -> Tensor:
        routed = flow.trace is not None and "routing" in flow.trace.wants
        if not torch.is_grad_enabled() or flow.cache is not None or routed:
            x = self.plainly(x, flow)
        else:
            weights = [weight for weight in self.blocks.parameters() if weight.requires_grad]
            given = (Walk(self.blocks, replace(flow)), x, x, flow.memory, *weights)
            halves: Pair = Reversed.apply(*given)  # type: ignore[no-untyped-call]
            x = torch.cat(halves, -1)
        return x if self.norm is None else self.norm(x, flow)

    def plainly(self, x: Tensor, flow: Flow) -> Tensor:
        """Return the last block's rows, whose gradient autograd takes in its own way: every activation is kept."""
        x, outer = torch.cat((x, x), -1), flow.path
        for i, block in enumerate(self.blocks):
            flow.path = f"{outer}{i}."
            x = block(x, flow)
        flow.path = outer
        return x


@dataclass
class Conditions:
    """What a part was walked under, beside its input: random states and autocast."""

    device: torch.device

    def __post_init__(self) -> None:
        kind = self.device.type
        self.random = torch.get_rng_state()
        on_device = torch.empty(0, device=self.device)
        self.devices, self.states = get_device_states(on_device)
        # Without its cache: autocast would hand weights that were narrowed without a graph to who needs their gradient.
        self.cast = torch.autocast(
            kind, torch.get_autocast_dtype(kind), enabled=torch.is_autocast_enabled(kind), cache_enabled=False
        )

    @contextmanager
    def again(self) -> Iterator[None]:
        """Let what is done inside find them as they were."""
        with torch.random.fork_rng(self.devices), self.cast:
            torch.set_rng_state(self.random)
            set_device_states(self.devices, self.states)
            yield


@dataclass
class Walk:
    """One pass through the blocks, and how to take it back."""

    blocks: nn.ModuleList
    flow: Flow
    conditions: list[Conditions] = field(default_factory=list)
    choices: dict[str, Tensor] = field(default_factory=dict)

    @property
    def halves(self) -> list[tuple[Part, str]]:
        """The f and g of each block in the order of the pass, with the path of their slots."""
        found = []
        for i, block in enumerate(self.blocks):
            assert isinstance(block, CouplingPart)
            found += [(part, f"{self.flow.path}{i}.") for part in (block.f, block.g)]
        return found

    def forth(self, first: Tensor, second: Tensor) -> Pair:
        """Walk without a graph. What layers share of the flow has none either, so it is kept from other layers."""
        flow = replace(self.flow, _made={}, choices=self.choices)
        for part, path in self.halves:
            self.conditions.append(Conditions(first.device))
            flow.path = path
            with self.conditions[-1].cast:
                first, second = second, first + part(second, flow)
        return first, second

    def back(self, rows: Pair, slopes: Pair, memory: Tensor | None) -> tuple[Pair, Gradients]:
        """Go back from the last block's rows and their slopes to the slopes of the first one's input."""
        (first, second), (d_first, d_second) = rows, slopes
        found = Gradients(memory)
        for (part, path), conditions in zip(reversed(self.halves), reversed(self.conditions), strict=True):
            flow = replace(self.flow, _made={}, path=path, trace=None, memory=memory, choices=self.choices)
            with torch.enable_grad(), conditions.again():
                given = first.detach().requires_grad_()
                made = part(given, flow)
            slope = found.collect(made, d_second.to(made.dtype), given, part)
            first, second = second - made.detach(), first
            d_first, d_second = d_second, d_first + slope
        return (d_first, d_second), found


class Gradients:
    """Gradients of the weights, by identity, and of the encoder's output, as far as they have been added up."""

    def __init__(self, memory: Tensor | None) -> None:
        self.shared = [] if memory is None or not memory.requires_grad else [memory]
        self.sums: dict[int, Tensor] = {}

    def collect(self, made: Tensor, slope: Tensor, given: Tensor, part: Part) -> Tensor:
        """Add up what `part` contributes, and return the slope of what it was given."""
        others = [*self.shared, *(weight for weight in part.parameters() if weight.requires_grad)]
        own, *more = torch.autograd.grad(made, [given, *others], slope, allow_unused=True)
        for tensor, gradient in zip(others, more, strict=True):
            if gradient is not None:
                before = self.sums.get(id(tensor))
                self.sums[id(tensor)] = gradient if before is None else before + gradient
        return torch.zeros_like(given) if own is None else own


class Reversed(torch.autograd.Function):
    """(walk, x₁, x₂, the encoder's output or None, all weights, which are named for their gradients) -> (y₁, y₂)."""

    @staticmethod
    def forward(ctx: Any, walk: Walk, first: Tensor, second: Tensor, memory: Tensor | None, *weights: Tensor) -> Pair:
        rows = walk.forth(first, second)
        ctx.walk, ctx.weights = walk, [id(weight) for weight in weights]
        ctx.save_for_backward(*rows, memory)
        return rows

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor | None, ...]:
        first, second, memory = ctx.saved_tensors
        if memory is not None:
            memory = memory.detach().requires_grad_(ctx.needs_input_grad[3])
        (d_first, d_second), found = ctx.walk.back((first, second), slopes, memory)
        weights = (found.sums.get(weight) for weight in ctx.weights)
        return None, d_first, d_second, found.sums.get(id(memory)), *weights
