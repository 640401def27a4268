"""What is given to a model, and the parts that it goes into first."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from polyformer.parts.flow import Cache, Flow, start_flow
from polyformer.parts.part import Part
from polyformer.spec import Record


@dataclass
class Given:
    """What is given to one side of a model.

    Attributes:
        input: the main input, such as ids [B, S] or pixels [B, C, height, width].
        mask: [B, K], non-zero where real, cached tokens included; None if all are real.
        documents: integers [B, K] telling packed documents apart, or None.
        cache: holds the K - S tokens before, or None.
        others: further inputs by name.
    """

    input: Tensor
    mask: Tensor | None = None
    documents: Tensor | None = None
    cache: Cache | None = None
    others: Mapping[str, Tensor] = field(default_factory=dict)


class InputPart(Part):
    """The first part of a side: it makes rows of the input, and begins their flow, as it alone knows how many.

    Attributes:
        main: the name of the input at the outer boundary.
    """

    main = "input_ids"

    @property
    def precision(self) -> torch.dtype:
        """What the part computes in, which pixels and sound that are given need not have."""
        return next(p.dtype for p in self.parameters() if p.is_floating_point())

    def begin(self, given: Given) -> Flow:
        """Begin the flow of the rows that this input gives; raises `SpecError` for shapes that can't be right."""
        flow = start_flow(given.input, given.mask, given.documents, given.cache)
        flow.inputs = {"ids": given.input, **given.others}
        return flow


class Delay(Record):
    """The decoder reads what the encoder reads, one place late, so that its row of a token has seen all before it.

    So BART judges a text (Lewis et al. 2020, section 3.1). The token `first` comes first; where it is None, the text's
    own last one does (mBART, whose texts end with the code of their language).
    """

    first: int | None = None

    def of(self, ids_BS: Tensor, mask_BS: Tensor | None = None) -> Tensor:
        """Return the decoder's ids [B, S], under the same mask as the encoder's."""
        real = torch.ones_like(ids_BS) if mask_BS is None else mask_BS.ne(0).long()
        places = real.cumsum(1)
        begins = (places == 1) & real.bool()
        if self.first is not None:
            return ids_BS.roll(1, 1).masked_fill(begins, self.first)
        last = ids_BS.gather(1, places.argmax(1, keepdim=True))
        return torch.where(begins, last, ids_BS.roll(1, 1))
