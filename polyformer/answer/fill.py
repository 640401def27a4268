"""The words that a masked language model would put in the place of its mask."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from polyformer.answer.texts import batches
from polyformer.errors import SpecError
from polyformer.generate.search import evaluating
from polyformer.parts.heads import LMHeadPart
from polyformer.parts.model import TransformerPart

if TYPE_CHECKING:
    from polyformer.data.checkpoint_tokenizer import TextTokenizer


@dataclass(frozen=True)
class Filled:
    """One candidate for one mask.

    Attributes:
        mask: which mask of the text, counted from 0.
        token, id: the candidate.
        probability: the model's.
        text: the text with it in place, other masks left.
    """

    mask: int
    token: str
    id: int
    probability: float
    text: str

    def to_data(self) -> dict[str, Any]:
        """Return what goes into JSON."""
        return vars(self).copy()


def fill(model: TransformerPart, tokenizer: TextTokenizer, text: str, count: int = 5) -> list[list[Filled]]:
    """Return the `count` most probable tokens for each mask of a text, best first.

    Args:
        text: with the tokenizer's mask token written in it, once or more.
    Raises:
        SpecError: no masked language model, no mask token, or no mask in the text.
    """
    if model.encoder is None or model.decoder is not None or not isinstance(model.head, LMHeadPart):
        raise SpecError("filling masks needs an encoder with a masked language model head; this is another model")
    mask_id = tokenizer.mask_id
    if mask_id is None:
        raise SpecError("this model's tokenizer has no mask token")
    ids = tokenizer.encode_markup(text)
    places = [i for i, one in enumerate(ids) if one == mask_id]
    if not places:
        (shown,) = tokenizer.tokens([mask_id])
        raise SpecError(f"the text has no mask: write {shown} where a word should be filled in")
    device = next(model.parameters()).device
    _, inputs, _ = next(batches([ids], tokenizer.pad_id or 0))
    with evaluating(model):
        hidden = model(input_ids=inputs.to(device)).hidden[0, places]
        probabilities = torch.softmax(model.head(hidden, None).float(), -1)
    best = probabilities.topk(min(count, probabilities.shape[-1]))
    return [
        [_filled(tokenizer, ids, i, place, int(token), float(p)) for p, token in zip(values, tokens, strict=True)]
        for i, (place, values, tokens) in enumerate(zip(places, best.values, best.indices, strict=True))
    ]


def _filled(
    tokenizer: TextTokenizer, ids: list[int], number: int, place: int, token: int, probability: float
) -> Filled:
    mask_id = ids[place]
    whole = [*ids[:place], token, *ids[place + 1 :]]
    control = {tokenizer.bos_id, tokenizer.eos_id, tokenizer.cls_id, tokenizer.sep_id} - {mask_id}
    shown = tokenizer.decode([one for one in whole if one not in control], keep_control=True)
    return Filled(number, tokenizer.decode([token], keep_control=True).strip(), token, probability, shown)
