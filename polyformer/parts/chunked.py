"""A part that treats each row by itself, walked over a few rows at a time."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from polyformer.errors import SpecError
from polyformer.parts.contract import Within, contract_of
from polyformer.parts.flow import Flow
from polyformer.parts.part import Part, Slotted
from polyformer.parts.view import View
from polyformer.spec import Spec


class Chunked(Spec):
    """`op` on `rows` rows of each sequence at a time, so that what is made inside of it is never all there at once.

    A feed-forward network's inner rows are several times as wide as the model (Kitaev et al. 2020, section 3). Where
    gradients are wanted, each piece is made again in the backward pass.

    Raises:
        SpecError: an op in which rows meet, or which can't be walked a second time.
    """

    op: Spec
    rows: int

    def check(self) -> None:
        self.require(self.rows > 0, "rows must be at least 1")
        clashes = contract_of(self.op)
        for clause in ("cached", "checkpointed"):
            clash = clashes.get(clause)
            if clash is not None and not isinstance(clash.term, Within):
                self.require(False, f"{clash.part} can't be walked piece by piece: {clash.term.why}")

    def module(self) -> Part:
        return ChunkedPart(self)


class ChunkedPart(Part):
    """x [B, S, D] -> [B, S, D']."""

    op: Part

    def __init__(self, spec: Chunked) -> None:
        super().__init__(spec)
        self.rows = spec.rows
        for inner in self.modules():
            if isinstance(inner, Slotted):
                raise SpecError(f"Chunked: in {type(inner.spec).__name__}, rows meet or are written down by slot")

    def forward(self, x: Tensor, flow: Flow) -> Tensor:
        if x.shape[1] <= self.rows:
            return self.op(x, flow)
        starts = range(0, x.shape[1], self.rows)
        return torch.cat([self._piece(x, flow, start) for start in starts], 1)

    def _piece(self, x: Tensor, flow: Flow, start: int) -> Tensor:
        piece = x[:, start : start + self.rows]
        inner = flow_of_rows(flow, start, piece.shape[1])
        if not torch.is_grad_enabled():
            return self.op(piece, inner)
        made: Tensor = checkpoint(self.op, piece, inner, use_reentrant=False)
        return made


def flow_of_rows(flow: Flow, start: int, count: int) -> Flow:
    """Return the flow of `count` rows of a pass by themselves: which are real, their places, documents and inputs."""
    here = slice(start, start + count)
    past = flow.view.keys - flow.view.queries
    valid, documents = flow.rows_valid, flow.view.key_documents
    view = View(
        count,
        count,
        None if valid is None else valid[:, here],
        None if documents is None else documents[:, past:][:, here],
        flow.view.right_padded,
        flow.view.device,
    )
    inputs = {name: values[:, here] for name, values in flow.inputs.items()}
    positions = flow.positions[:, here]
    return replace(flow, view=view, positions=positions, inputs=inputs, cache=None, grid=None, _made={})
