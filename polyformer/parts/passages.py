"""Several passages to one question: each is read alone, and all of them are looked at together (Fusion-in-Decoder).

Shape letters: B batch, P passages of each question, T length of a passage, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from polyformer.errors import SpecError
from polyformer.parts.embeddings import Embed, EmbedPart
from polyformer.parts.flow import Flow
from polyformer.parts.inputs import Given
from polyformer.parts.part import Part
from polyformer.parts.view import View
from polyformer.spec import Spec


class Passages(Embed):
    """An embedding of passages [B, P, T], each a row of the batch for the stack behind it (Izacard and Grave 2021).

    So an encoder's cost grows with the number of passages, not with its square, and none knows of another: neither the
    order of passages nor one that is all padding matters. `Fused` puts their rows together again. Ids [B, T] are one
    passage each.
    """

    def module(self) -> Part:
        return PassagesPart(self)


class Fused(Spec):
    """The rows of a question's passages behind each other [B, P·T, D], for a decoder that looks at all of them.

    It is the `bridge` of a model whose source is `Passages`.
    """

    def module(self) -> Part:
        return FusedPart(self)


class PassagesPart(EmbedPart):
    """ids [B, P, T] -> [B·P, T, D], and [B, T] -> [B, T, D]."""

    def begin(self, given: Given) -> Flow:
        ids = given.input
        if ids.ndim not in (2, 3):
            raise SpecError(f"input_ids has shape {list(ids.shape)}; passages are [questions, passages, tokens]")
        if ids.ndim == 2:
            return super().begin(given)
        if given.mask is not None and given.mask.shape != ids.shape:
            raise SpecError(
                f"the attention mask has shape {list(given.mask.shape)}, but the passages {list(ids.shape)}"
            )
        mask, documents = (None if one is None else one.flatten(0, 1) for one in (given.mask, given.documents))
        others = {name: values.flatten(0, 1) for name, values in given.others.items()}
        flow = super().begin(Given(ids.flatten(0, 1), mask, documents, given.cache, others))
        flow.passages = ids.shape[1]
        return flow

    def forward(self, x: Tensor, flow: Flow) -> Tensor:
        return super().forward(x.flatten(0, 1) if x.ndim == 3 else x, flow)


class FusedPart(Part):
    """x [B·P, T, D] -> [B, P·T, D]."""

    def forward(self, x: Tensor, flow: Flow) -> Tensor:
        count = flow.passages
        if count == 1:
            return x
        valid, rows = flow.rows_valid, count * x.shape[1]
        flow.renew(rows)
        real = None if valid is None else valid.reshape(-1, rows)
        flow.view, flow.passages = View(rows, rows, real, None, False, flow.view.device), 1
        return torch.unflatten(x, 0, (-1, count)).flatten(1, 2)
