"""The affine map, the one place where most weights live (and where adapters and quantised weights come in)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from polyformer.parts.part import Part
from polyformer.spec import Spec

if TYPE_CHECKING:
    from polyformer.parts.flow import Flow


class Affine(Spec, abstract=True):
    """y = x Wᵀ + b, with W [outputs, inputs] held in some form: adapters stand beside any of these.

    A form says which tensors it holds a matrix in, and what matrix some tensors are: by that a model's weights are
    carried from one form into another.
    """

    inputs: int
    outputs: int
    bias: bool = True

    def check(self) -> None:
        self.require(self.inputs > 0 and self.outputs > 0, "inputs and outputs must be at least 1")

    def holds_as(self, other: Affine) -> bool:
        """Tell whether both hold a matrix in the same way, so that tensors of one mean the same in the other."""
        return type(self) is type(other)

    def held(self, matrix: Tensor) -> dict[str, Tensor]:
        """Return the tensors in which this form holds a matrix [outputs, inputs], by their names in its part."""
        raise NotImplementedError

    def matrix(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Return the matrix [outputs, inputs] that tensors of this form are."""
        raise NotImplementedError


class AffinePart(Part):
    """x [..., inputs] -> [..., outputs]."""

    spec: Affine
    bias: Tensor | None

    def matrix(self) -> Tensor:
        """Return W [outputs, inputs] as floating-point numbers."""
        return self.spec.matrix({**dict(self.named_parameters()), **dict(self.named_buffers())})

    def frozen(self, kind: torch.dtype) -> bool:
        """Tell whether W doesn't learn, and products with rows of this type are made in it."""
        return False

    def times(self, rows: Tensor) -> Tensor:
        """Return x Wᵀ [N, outputs] for rows x [N, inputs], outside of any graph; see `frozen`."""
        raise NotImplementedError

    def times_back(self, gradient: Tensor) -> Tensor:
        """Return g W [N, inputs], the gradient of the rows, for that of the answer g [N, outputs]."""
        raise NotImplementedError


class Linear(Affine):
    """y = x Wᵀ + b, with W [outputs, inputs]. Starts from Xavier's uniform distribution (Glorot and Bengio 2010)."""

    def held(self, matrix: Tensor) -> dict[str, Tensor]:
        return {"weight": matrix}

    def matrix(self, tensors: Mapping[str, Tensor]) -> Tensor:
        return tensors["weight"]

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

    def frozen(self, kind: torch.dtype) -> bool:
        return not self.weight.requires_grad and self.weight.dtype == kind

    def times(self, rows: Tensor) -> Tensor:
        return rows @ self.weight.detach().mT

    def times_back(self, gradient: Tensor) -> Tensor:
        return gradient @ self.weight.detach()
