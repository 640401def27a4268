"""The base of every module: a part holds its spec, and its children are the parts of the spec's children."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import Tensor, nn

from polyformer.errors import SpecError
from polyformer.parts.contract import Refuses, asked
from polyformer.spec import Spec, child_fields

if TYPE_CHECKING:
    from polyformer.parts.flow import Flow


class Part(nn.Module):
    """A module made from a spec.

    Each field of the spec that holds a `Spec` becomes a child of the same name, and a tuple of them a
    `ModuleList`: so the path of a spec in its tree is the path of its module, and a parameter's name tells where
    it stands in the spec. A part has one signature, `forward(x, flow) -> x`; what travels beside `x` is in `Flow`.

    Attributes:
        by_chance: names of buffers that are drawn at random, so that an average of several says nothing.
    """

    by_chance: frozenset[str] = frozenset()
    __call__: Callable[..., Tensor]

    reads: frozenset[str] = frozenset()
    """Names of further inputs that it takes from `flow.inputs`."""

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.spec = spec
        self.refusals = {clause: term.why for clause, term in spec.breaks().items() if isinstance(term, Refuses)}
        for name, shape in child_fields(type(spec)).items():
            value = getattr(spec, name)
            if shape == "many":
                self.add_module(name, nn.ModuleList(item.module() for item in value))
            else:
                self.register_module(name, None if value is None else value.module())

    def forward(self, x: Tensor, flow: Flow) -> Tensor:
        """Map x [B, S, D] to the same shape unless the part says otherwise."""
        raise NotImplementedError

    def agree(self, flow: Flow) -> None:
        """Raise `SpecError` where this pass asks for what the spec declares that it refuses (`Spec.breaks`).

        A part whose spec refuses something calls this first.
        """
        if self.refusals:
            for clause in asked(flow):
                if clause in self.refusals:
                    raise SpecError(f"{type(self.spec).__name__} can't be {clause}: {self.refusals[clause]}")


class Slotted(Part):
    """A part that is known by where it stands: in caches and traces as `flow.path + slot`, which its stack gives it."""

    slot = ""


def name_slots(blocks: nn.ModuleList) -> None:
    """Name each slotted part by its path in its block; which block it is the flow's path says."""
    for block in blocks:
        for name, inner in block.named_modules():
            if isinstance(inner, Slotted):
                inner.slot = name


def draw_normal(tensor: Tensor, std: float) -> None:
    """Fill with normally distributed initial values, except on the meta device.

    There is nothing to fill there, but PyTorch would import its symbolic machinery to find that out: over a second
    and 70 MB, each time that a model is loaded.
    """
    if not tensor.is_meta:
        nn.init.normal_(tensor, std=std)
