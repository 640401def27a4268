"""A frozen affine map whose matrix is held in four bits an element, for QLoRA.

N rows, I inputs, O outputs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from polyformer.errors import WeightsError
from polyformer.parts.linear import Affine, AffinePart
from polyformer.parts.part import Part
from polyformer.shrink.codes import Form, from_bytes, pairs, to_bytes, to_halves

if TYPE_CHECKING:
    from polyformer.parts.flow import Flow

NESTED = 256
"""How many blocks' magnitudes share one of their own."""

PIECE = 2**20
"""How many elements are made numbers at a time: 4 MB of float32."""

Compute = Literal["float32", "bfloat16", "float16"]


class Linear4(Affine):
    """y = x Wᵀ + b, with W in 4-bit codes by blocks of its rows laid behind each other (QLoRA: Dettmers et al. 2023).

    W is not trained: the codes are buffers, and what goes back through them is the input's gradient. Only `PIECE`
    elements at a time are ever numbers. `scales` says how the magnitudes of blocks are held: in 8 bits by the dynamic
    map ("nested": double quantisation, 4.127 bits an element in all), or as they are (4.5 bits). Products are made in
    the type `compute`, or if None in that of the input (under autocast, in autocast's).
    """

    form: Form = "nf4"
    block: int = 64
    scales: Literal["nested", "float32"] = "nested"
    compute: Compute | None = None

    def check(self) -> None:
        super().check()
        whole = self.block >= 32 and self.block & (self.block - 1) == 0
        self.require(whole, f"block must be a power of two and at least 32, not {self.block}")

    def holds_as(self, other: Affine) -> bool:
        if not isinstance(other, Linear4):
            return False
        return (self.form, self.block, self.scales) == (other.form, other.block, other.scales)

    def shapes(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Return shape and type of each tensor. Magnitudes are float32 as bits: a model's precision isn't theirs."""
        count = self.outputs * self.inputs
        blocks = -(-count // self.block)
        codes = {"codes": ((-(-count // 2),), torch.uint8)}
        if self.scales == "float32":
            return {**codes, "absmax": ((blocks,), torch.int32)}
        nested = {"nested_absmax": ((-(-blocks // NESTED),), torch.int32), "nested_offset": ((), torch.int32)}
        return {**codes, "absmax": ((blocks,), torch.uint8), **nested}

    def held(self, matrix: Tensor) -> dict[str, Tensor]:
        if not bool(matrix.isfinite().all()):
            raise WeightsError("a matrix with values that are no numbers can't be quantised")
        codes, largest = to_halves(matrix.detach().reshape(-1), self.block, self.form)
        if self.scales == "float32":
            return {"codes": codes, "absmax": largest.view(torch.int32)}
        offset = largest.mean()
        absmax, nested = to_bytes(largest - offset, NESTED)
        bits = {"nested_absmax": nested.view(torch.int32), "nested_offset": offset.view(torch.int32)}
        return {"codes": codes, "absmax": absmax, **bits}

    def magnitudes(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Return the largest magnitude of each block [⌈O·I/block⌉], float32."""
        if self.scales == "float32":
            return tensors["absmax"].view(torch.float32)
        nested = tensors["nested_absmax"].view(torch.float32)
        return from_bytes(tensors["absmax"], nested, NESTED).add_(tensors["nested_offset"].view(torch.float32))

    def pieces(self, tensors: Mapping[str, Tensor], kind: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
        """Yield runs of outputs and their rows of W [o, I] in type `kind`, which are gone when the next are asked for.

        A run ends where a block does.
        """
        codes, largest = tensors["codes"], self.magnitudes(tensors)
        table = pairs(self.form).to(codes.device)
        together = self.block // math.gcd(self.block, self.inputs)
        step = min(max(PIECE // (self.inputs * together), 1) * together, self.outputs)
        room = torch.empty(-(-step * self.inputs // self.block) * self.block, device=codes.device)
        for start in range(0, self.outputs, step):
            stop = min(start + step, self.outputs)
            first, last = start * self.inputs, stop * self.inputs
            given = codes[first // 2 : -(-last // 2)].int()
            own = largest[first // self.block : -(-last // self.block)]
            values = room[: len(own) * self.block]
            torch.index_select(table, 0, given, out=values.view(torch.int64)[: len(given)])
            values.view(-1, self.block).mul_(own[:, None])
            yield slice(start, stop), values[: last - first].view(-1, self.inputs).to(kind)

    def matrix(self, tensors: Mapping[str, Tensor]) -> Tensor:
        found = torch.empty(self.outputs, self.inputs, device=tensors["codes"].device)
        for run, rows in self.pieces(tensors, torch.float32):
            found[run] = rows
        return found

    def module(self) -> Part:
        return Linear4Part(self)


class Linear4Part(AffinePart):
    """x [..., I] -> [..., O]. A fresh one holds initial values of a `Linear`."""

    spec: Linear4

    def __init__(self, spec: Linear4) -> None:
        super().__init__(spec)
        self.bias = nn.Parameter(torch.zeros(spec.outputs)) if spec.bias else None
        initial = torch.empty(spec.outputs, spec.inputs)
        if initial.is_meta:
            made = {name: torch.empty(shape, dtype=kind) for name, (shape, kind) in spec.shapes().items()}
        else:
            made = spec.held(nn.init.xavier_uniform_(initial))
        for name, tensor in made.items():
            self.register_buffer(name, tensor)

    def tensors(self) -> dict[str, Tensor]:
        """Return what the matrix is held in."""
        return {name: self.get_buffer(name) for name in self.spec.shapes()}

    def forward(self, x: Tensor, flow: Flow | None = None) -> Tensor:
        device, chosen = x.device.type, self.spec.compute
        auto = torch.is_autocast_enabled(device)
        kind = torch.get_autocast_dtype(device) if auto else x.dtype
        product = kind if chosen is None else getattr(torch, chosen)
        y: Tensor = Product4.apply(x, self, product).to(kind)  # type: ignore[no-untyped-call]
        return y if self.bias is None else y + self.bias.to(kind)

    def frozen(self, kind: torch.dtype) -> bool:
        return self.spec.compute is None or getattr(torch, self.spec.compute) == kind

    def times(self, rows: Tensor) -> Tensor:
        y = rows.new_empty(len(rows), self.spec.outputs)
        for run, matrix in self.spec.pieces(self.tensors(), rows.dtype):
            torch.mm(rows, matrix.mT, out=y[:, run])
        return y

    def times_back(self, gradient: Tensor) -> Tensor:
        found = gradient.new_zeros(len(gradient), self.spec.inputs)
        for run, matrix in self.spec.pieces(self.tensors(), gradient.dtype):
            found.addmm_(gradient[:, run], matrix)
        return found


class Product4(torch.autograd.Function):
    """(x [..., I], a `Linear4Part`, the type to multiply in) -> x Wᵀ [..., O] in that type. Neither x nor W is kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, part: Linear4Part, kind: torch.dtype) -> Tensor:
        ctx.part, ctx.kind = part, x.dtype
        with torch.autocast(x.device.type, enabled=False):
            y = part.times(x.reshape(-1, x.shape[-1]).to(kind))
        return y.view(*x.shape[:-1], part.spec.outputs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        found = ctx.part.times_back(gradient.reshape(-1, gradient.shape[-1]))
        return found.view(*gradient.shape[:-1], ctx.part.spec.inputs).to(ctx.kind), None, None
