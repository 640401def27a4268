"""What a checkpoint holds and nothing reads."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from polyformer.parts.part import Part
from polyformer.spec import Spec

if TYPE_CHECKING:
    from polyformer.parts.flow import Flow


class Idle(Spec):
    """Tensors that a published model holds but never uses, kept so that saving gives them back; rows pass unchanged.

    `holds` is their kind: "numbers" that have the precision of the weights, or 64-bit "counts".
    """

    shapes: tuple[tuple[int, ...], ...]
    holds: Literal["numbers", "counts"] = "numbers"

    def check(self) -> None:
        self.require(all(side > 0 for shape in self.shapes for side in shape), "all sides must be at least 1")

    def module(self) -> Part:
        return IdlePart(self)


class IdlePart(Part):
    """x -> x. Holds buffers `tensor_0`, `tensor_1`, …, which are not trained."""

    def __init__(self, spec: Idle) -> None:
        super().__init__(spec)
        for i, shape in enumerate(spec.shapes):
            kind = torch.long if spec.holds == "counts" else torch.get_default_dtype()
            self.register_buffer(f"tensor_{i}", torch.zeros(shape, dtype=kind))

    def forward(self, x: Tensor, flow: Flow | None = None) -> Tensor:
        return x
