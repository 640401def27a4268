"""Labels of texts and images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from polyformer.answer.texts import read_each
from polyformer.errors import SpecError
from polyformer.generate.search import evaluating
from polyformer.parts.model import Output, TransformerPart

if TYPE_CHECKING:
    from polyformer.data.checkpoint_tokenizer import TextTokenizer
    from polyformer.data.images import ImageReader


@dataclass(frozen=True)
class Label:
    """One label and its probability."""

    label: str
    probability: float

    def to_data(self) -> dict[str, Any]:
        """Return what goes into JSON."""
        return vars(self).copy()


def classify_texts(
    model: TransformerPart, tokenizer: TextTokenizer, texts: Sequence[str], labels: Sequence[str]
) -> list[list[Label]]:
    """Return the labels of each text, the most probable first.

    Raises:
        SpecError: a model that doesn't give one score for each label; a text longer than its positions.
    """

    def take(out: Output, mask: Tensor) -> Tensor:
        return _scores(out, labels)

    rows = tokenizer.encode_batch(list(texts))
    return [_ranked(scores, labels) for scores in read_each(model, tokenizer, rows, take)]


def classify_images(
    model: TransformerPart, reader: ImageReader, files: Sequence[Path], labels: Sequence[str]
) -> list[list[Label]]:
    """Return the labels of each image, the most probable first.

    Raises:
        SpecError: a model that doesn't give one score for each label.
        DataError: a file that is no image.
    """
    parameter = next(model.parameters())
    found = []
    with evaluating(model):
        for file in files:
            pixels = reader.read(file)[None].to(parameter.device, parameter.dtype)
            found.append(_ranked(_scores(model(pixel_values=pixels), labels)[0], labels))
    return found


def _scores(out: Output, labels: Sequence[str]) -> Tensor:
    if out.logits is None or out.logits.ndim != 2 or out.logits.shape[1] != len(labels):
        raise SpecError("this model does not give one score to a label of the whole input, so it can't classify")
    return out.logits


def _ranked(scores: Tensor, labels: Sequence[str]) -> list[Label]:
    chances = torch.softmax(scores.float(), -1)
    order = chances.argsort(descending=True, stable=True).tolist()
    return [Label(labels[i], float(chances[i])) for i in order]
