"""A translation model judged on pairs that it has not seen."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import reduce
from operator import add
from typing import TYPE_CHECKING, Any

from polyformer.data.batches import Batches, BatchRecipe, encode_pairs
from polyformer.data.pairs import Pair
from polyformer.errors import DataError
from polyformer.generate import Search, Translation, translate
from polyformer.judge.held_out import HeldOut, held_out_loss
from polyformer.judge.scores import Score, bleu, chrf
from polyformer.parts.model import TransformerPart

if TYPE_CHECKING:
    from polyformer.data.tokenizer import TextPairTokenizer


@dataclass(frozen=True)
class Direction:
    """The scores of one direction, such as "en-de", and the translations that they are of."""

    name: str
    pairs: Sequence[Pair]
    held_out: HeldOut
    bleu: Score
    chrf: Score
    translations: list[Translation] = field(repr=False)

    def to_data(self) -> dict[str, Any]:
        """Return what goes into JSON; the translations are left out."""
        return {
            "direction": self.name,
            "pairs": len(self.pairs),
            "bleu": self.bleu.to_data(),
            "chrf": self.chrf.to_data(),
            "held_out": self.held_out.to_data(),
        }


@dataclass(frozen=True)
class Evaluation:
    """A model's scores.

    Attributes:
        directions: each direction for itself: BLEU of different languages can't be averaged.
        settings: the search that made the translations.
        seconds: what translating took.
    """

    directions: list[Direction]
    settings: Search
    seconds: float

    @property
    def held_out(self) -> HeldOut:
        """Loss and perplexity over all directions, each token counting the same."""
        return reduce(add, (direction.held_out for direction in self.directions))

    def to_data(self) -> dict[str, Any]:
        """Return what goes into JSON."""
        return {
            "directions": [direction.to_data() for direction in self.directions],
            "held_out": self.held_out.to_data(),
            "search": self.settings.to_data(),
            "seconds": round(self.seconds, 3),
        }


def evaluate(
    model: TransformerPart,
    tokenizer: TextPairTokenizer,
    pairs: Sequence[Pair],
    settings: Search | None = None,
    progress: Callable[[int], None] | None = None,
) -> Evaluation:
    """Translate the sources and compare with the targets; measure the targets' loss too.

    Args:
        pairs: of one or several directions.
        settings: how to search; `Search()` if None.
        progress: called with the number of pairs that are newly translated.
    Raises:
        DataError: no pairs, a text that is too long for the model, a language that the tokenizer doesn't know.
    """
    if not pairs:
        raise DataError("there are no pairs to evaluate on")
    settings = settings or Search()
    seconds, directions = 0.0, []
    for name in sorted({pair.direction for pair in pairs}):
        own = [pair for pair in pairs if pair.direction == name]
        language = own[0].target_language
        started = time.perf_counter()
        sources = [pair.source for pair in own]
        found = translate(model, tokenizer, sources, settings, language, progress=progress)
        seconds += time.perf_counter() - started
        best = [one[0] for one in found]
        texts, references = [one.text for one in best], [pair.target for pair in own]
        scores = bleu(texts, references, language), chrf(texts, references)
        directions.append(Direction(name, own, _held_out(model, tokenizer, own), *scores, best))
    return Evaluation(directions, settings, seconds)


def _held_out(model: TransformerPart, tokenizer: TextPairTokenizer, pairs: Sequence[Pair]) -> HeldOut:
    """Measure the loss on all pairs, however long."""
    data = encode_pairs(tokenizer, pairs, BatchRecipe(longest=sys.maxsize))
    recipe = BatchRecipe()
    roomy = recipe.replace(tokens=max(recipe.tokens, int(data.longer.max())))
    return held_out_loss(model, Batches(data, roomy).in_order())
