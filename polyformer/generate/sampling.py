"""How a text's next token is chosen: the likeliest one, or one drawn by chance, after what processors do to the scores.

Shape letter: V vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from polyformer.errors import RunError
from polyformer.generate.processors import NEVER, Processor, Temperature, TopK, TopP, Written, in_order
from polyformer.generate.scores import likeliest, tensor_of
from polyformer.spec import Record

if TYPE_CHECKING:
    from torch import Generator, Tensor

    from polyformer.generate.scores import Scores


class Sampling(Record):
    """How a text is continued.

    Attributes:
        temperature: what scores are divided by before one is drawn; 0 takes the likeliest token.
        top_k: draw among so many likeliest tokens only; None for all.
        top_p: draw among the fewest likeliest tokens whose probabilities reach this sum (nucleus sampling: Holtzman
            et al. 2020); None for all.
        limit: how many tokens are written at most.
        seed: of the chance. Texts that are continued together draw from seed, seed + 1 …, each as it would alone.
        processors: what else is done to the scores; the order that they are given in doesn't matter.
        stop: what ends a text as soon as it stands in it, and is left out of it.
        shown: for how many of the likeliest tokens log-probabilities are told.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    limit: int = 64
    seed: int = 0
    processors: tuple[Processor, ...] = ()
    stop: tuple[str, ...] = ()
    shown: int = 0

    def check(self) -> None:
        self.require(0 <= self.temperature < 1e6, f"temperature must be 0 or more, not {self.temperature}")
        self.require(self.top_k is None or self.top_k > 0, f"top_k must be at least 1, not {self.top_k}")
        self.require(self.top_p is None or 0 < self.top_p <= 1, f"top_p must be in (0, 1], not {self.top_p}")
        self.require(self.limit > 0, f"limit must be at least 1, not {self.limit}")
        self.require(0 <= self.seed < 2**62, f"seed must be between 0 and 2^62, not {self.seed}")
        self.require(all(self.stop), "an empty text can't stop anything; leave it out of stop")
        whole = not any("\ud800" <= letter <= "\udfff" for one in self.stop for letter in one)
        self.require(whole, "a text to stop at has half of a surrogate pair, which no text that is written can have")
        self.require(0 <= self.shown <= 1000, f"shown must be between 0 and 1000, not {self.shown}")

    @property
    def chain(self) -> tuple[Processor, ...]:
        """All processors in order; those that only shape a draw are left out where nothing is drawn."""
        found = list(self.processors)
        found += [] if self.temperature in (0, 1) else [Temperature(self.temperature)]
        found += [] if self.top_k is None else [TopK(self.top_k)]
        found += [] if self.top_p is None else [TopP(self.top_p)]
        return in_order(one for one in found if self.temperature or not one.draws)


@dataclass(frozen=True)
class Scored:
    """A token that was written.

    Attributes:
        id: the token.
        log_probability: nats, under the model, before anything was done to its scores.
        likeliest: the likeliest tokens at its place and their log-probabilities, as many as were asked for.
    """

    id: int
    log_probability: float
    likeliest: tuple[tuple[int, float], ...] = ()


class Chooser:
    """Chooses the tokens of one text, with a source of chance of its own.

    So what it chooses depends on the scores and the seed only, not on what else is written at the same time.
    """

    def __init__(self, settings: Sampling) -> None:
        self.settings, self.chain = settings, settings.chain

    @functools.cached_property
    def chance(self) -> Generator:
        """The source of chance; PyTorch is first needed here, where something is drawn."""
        import torch

        return torch.Generator().manual_seed(self.settings.seed)

    def choose(self, scores: Scores, text: Written) -> int:
        """Return the next token by the model's scores [V].

        Raises:
            RunError: the processors leave no token.
        """
        if not self.settings.temperature:
            processed = self.processed(tensor_of(scores), text) if self.chain else scores
            token = int(processed.argmax())
            if float(processed[token]) == NEVER:
                raise RunError("every token is forbidden here, so nothing can be written")
            return token
        return self.draw(self.chances(scores, text))

    def processed(self, scores: Tensor, text: Written) -> Tensor:
        """Return the scores [V] after all processors."""
        for one in self.chain:
            scores = one.apply(scores, text)
        return scores

    def chances(self, scores: Scores, text: Written) -> Tensor:
        """Return the probabilities [V] by which the next token is drawn; all of one token's where nothing is.

        Raises:
            RunError: the processors leave no token, or a score that is no number.
        """
        processed = self.processed(tensor_of(scores), text)
        if not self.settings.temperature:
            return processed.new_zeros(processed.shape).index_fill(0, processed.argmax(), 1.0)
        found = processed.softmax(-1)
        if not bool(found.isfinite().all()):
            raise RunError("every token is forbidden here, or a processor made scores that are no numbers")
        return found

    def draw(self, chances: Tensor) -> int:
        """Draw a token by probabilities [V], which need not add up to 1."""
        return int(chances.cpu().multinomial(1, generator=self.chance))

    def uniform(self) -> float:
        """Draw a number from [0, 1)."""
        import torch

        return float(torch.rand((), generator=self.chance, dtype=torch.float64))


def scored(scores: Scores, normalisers: Scores, chosen: Sequence[int], shown: int) -> list[Scored]:
    """Return tokens with their log-probabilities.

    Args:
        scores: the model's own [W, V].
        normalisers: their log-sum-exp [W].
        shown: how many of the likeliest are told.
    """
    found = []
    for row, normaliser, token in zip(scores, normalisers, chosen, strict=True):
        best = likeliest(row - normaliser, shown) if shown else ()
        found.append(Scored(token, float(row[token] - normaliser), best))
    return found
