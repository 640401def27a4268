"""Texts to vectors whose cosines say how near their meanings are."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from polyformer.answer.texts import read_each
from polyformer.errors import SpecError
from polyformer.parts.flow import Flow, start_flow
from polyformer.parts.model import Output, TransformerPart
from polyformer.parts.part import Part

if TYPE_CHECKING:
    from polyformer.data.checkpoint_tokenizer import TextTokenizer

logger = logging.getLogger(__name__)


def embed_texts(
    model: TransformerPart,
    tokenizer: TextTokenizer,
    texts: Sequence[str],
    pooling: Part,
    length: int | None = None,
) -> Tensor:
    """Return a vector for each text: [N, D].

    Args:
        model: an encoder, or a decoder whose last row has seen all.
        pooling: rows [B, S, D] to vectors [B, D], such as `Chain((Mean(), Normalise())).build()`.
        length: longer texts are cut to so many tokens, their last one kept; a message in the log says so.
    Raises:
        SpecError: an encoder–decoder model; a text longer than the model's positions.
    """
    if model.encoder is not None and model.decoder is not None:
        raise SpecError("embedding texts needs an encoder or a decoder alone; this model has both")

    def take(out: Output, mask: Tensor) -> Tensor:
        flow: Flow = start_flow(out.hidden, mask)
        return pooling(out.hidden, flow)

    rows = tokenizer.encode_batch(list(texts))
    if length is not None:
        cut = sum(len(ids) > length for ids in rows)
        if cut:
            logger.warning("%d of %d texts were cut to %d tokens, as the model asks", cut, len(rows), length)
        rows = [ids if len(ids) <= length else [*ids[: length - 1], ids[-1]] for ids in rows]
    found = read_each(model, tokenizer, rows, take)
    return torch.stack(found) if found else torch.empty(0, 0)
