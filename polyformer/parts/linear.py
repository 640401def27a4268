"""The affine map, the one place where most weights live (and where adapters and quantised weights come in)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from polyformer.parts.part import Part
from polyformer.spec import Spec

if TYPE_CHECKING:
    from polyformer.parts.flow import Flow


class Affine(Spec, abstract=True):
    """y = x Wᵀ + b, with W [outputs, inputs], however W is held: adapters stand beside any of these."""

    inputs: int
    outputs: int
    bias: bool = True

    def check(self) -> None:
        self.require(self.inputs > 0 and self.outputs > 0, "inputs and outputs must be at least 1")


class AffinePart(Part):
    """x [..., inputs] -> [..., outputs]."""

    bias: Tensor | None

    def matrix(self) -> Tensor:
        """Return W [outputs, inputs] as floating-point numbers."""
        raise NotImplementedError


class Linear(Affine):
    """y = x Wᵀ + b, with W [outputs, inputs]. Starts from Xavier's uniform distribution (Glorot and Bengio 2010)."""

    def module(self) -> Part:
        return LinearPart(self)


class LinearPart(AffinePart):
    """W is a parameter of floating-point numbers."""

    def __init__(self, spec: Linear) -> None:
        super().__init__(spec)
        self.weight = nn.Parameter(torch.empty(spec.outputs, spec.inputs))
        self.bias = nn.Parameter(torch.zeros(spec.outputs)) if spec.bias else None
        nn.init.xavier_uniform_(self.weight)

    def forward(self, x: Tensor, flow: Flow | None = None) -> Tensor:
        return F.linear(x, self.weight, self.bias)

    def matrix(self) -> Tensor:
        return self.weight
