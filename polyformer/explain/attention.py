"""The attention weights of a translation, by layer and head."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from polyformer.errors import SpecError
from polyformer.generate.search import evaluating
from polyformer.parts.attention import CrossAttentionPart
from polyformer.parts.flow import Trace
from polyformer.parts.model import TransformerPart
from polyformer.parts.stack import StackPart

if TYPE_CHECKING:
    from polyformer.data.tokenizer import TextPairTokenizer

Kind = Literal["encoder", "decoder", "cross"]


@dataclass(frozen=True)
class AttentionMap:
    """Where one layer looks.

    Attributes:
        kind: self-attention of the encoder or of the decoder, or the decoder's attention to the source.
        layer: counted from 1.
        weights: [H, S, K], each row a distribution over the keys.
    """

    kind: Kind
    layer: int
    weights: Tensor


@dataclass(frozen=True)
class Explained:
    """The attention of a whole translation.

    Attributes:
        source: tokens that the encoder read [T].
        read: tokens that the decoder read, the start token first [S].
        written: tokens that it wrote having read these, the end token last [S]. A row of the decoder's maps is
            named by what it writes, a column by what it looks at.
        maps: one for each attention, in the order in which they were computed.
    """

    source: list[str]
    read: list[str]
    written: list[str]
    maps: list[AttentionMap]


def explain_attention(
    model: TransformerPart, tokenizer: TextPairTokenizer, source_ids: Sequence[int], target_ids: Sequence[int]
) -> Explained:
    """Compute the attention weights of a translation that is known, in one pass.

    The kernels that make translating fast keep no weights; this pass computes them anew, and only here is a trace
    carried, so that nothing is slower where none is asked for.

    Args:
        source_ids: as `tokenizer.encode_source` gives them.
        target_ids: without start and end tokens, as `Translation.ids` has them.
    Raises:
        SpecError: a model without an encoder or decoder.
    """
    if model.encoder is None or model.decoder is None:
        raise SpecError("the attention of a translation needs a model with an encoder and a decoder")
    device = next(model.parameters()).device
    read = [tokenizer.bos_id, *target_ids]
    trace = Trace()
    with evaluating(model):
        memory = model.encode(torch.tensor([source_ids], device=device), trace=trace)
        model.decode(torch.tensor([read], device=device), memory=memory, trace=trace)
    maps = [_map(model, slot, weights[0].float().cpu()) for slot, weights in trace.attention.items()]
    written = tokenizer.target_tokens([*target_ids, tokenizer.eos_id])
    return Explained(tokenizer.source_tokens(source_ids), tokenizer.target_tokens(read), written, maps)


def _map(model: TransformerPart, slot: str, weights: Tensor) -> AttentionMap:
    """Say which attention a trace's slot, such as "decoder.2.steps.1.op", belongs to."""
    side, number, inner = slot.split(".", 2)
    stack = getattr(model, side)
    assert isinstance(stack, StackPart)
    cross = isinstance(stack.blocks[int(number)].get_submodule(inner), CrossAttentionPart)
    kind: Kind = "encoder" if side == "encoder" else "cross" if cross else "decoder"
    return AttentionMap(kind, int(number) + 1, weights)
