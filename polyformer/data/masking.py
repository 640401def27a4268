"""What a language model is asked for: the next token, or those that are masked.

Shape letters: B rows of a batch, S tokens of a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from polyformer.data.checkpoint_tokenizer import TextTokenizer
from polyformer.data.reader import IGNORED, Ints
from polyformer.data.text_tokenizer import Letters
from polyformer.errors import DataError
from polyformer.spec import Record

Reads = Literal["forwards", "both ways"]


class Guess(NamedTuple):
    """What chance may depend on: the seed, the epoch of training or None for evaluation, and the number of the row."""

    seed: int
    epoch: int | None
    row: int

    def random(self) -> np.random.Generator:
        """Return a source of chance of this row in this epoch."""
        return np.random.default_rng([self.seed, 0 if self.epoch is None else self.epoch + 1, self.row])


@dataclass
class Asked:
    """Rows of tokens with the one that follows each: ids, which are real, and their documents, each [B, S + 1]."""

    ids: Ints
    real: npt.NDArray[np.bool_]
    documents: Ints | None


class Question(NamedTuple):
    """What a model is given and asked for: ids [B, S] and labels [B, S], -100 where nothing is asked."""

    ids: Ints
    labels: Ints


class Task(Protocol):
    """An objective that knows its vocabulary."""

    def ask(self, asked: Asked, guesses: Sequence[Guess]) -> Question:
        """Make the question of some rows, each by its own chance."""


class TextObjective(Record, abstract=True):
    """What a language model learns to say.

    Attributes:
        reads: which tokens a model may look at.
    """

    reads: ClassVar[Reads]

    def task(self, tokenizer: TextTokenizer, letters: Letters) -> Task:
        """Return the objective for a vocabulary; raises `DataError` if that lacks a token that it needs."""
        raise NotImplementedError


class NextToken(TextObjective):
    """Causal language modelling: each row says which token follows (Radford et al. 2018, equation 1)."""

    reads: ClassVar[Reads] = "forwards"

    def task(self, tokenizer: TextTokenizer, letters: Letters) -> Task:
        return _Next()


class MaskedTokens(TextObjective):
    """Masked language modelling (Devlin et al. 2019, section 3.1, task 1).

    A `share` of a row's tokens, at least one, are asked for. Of these, a share `hidden` is replaced by the mask, a
    share `replaced` by a random token, and the rest is given as it is. "words" are masked whole or not at all, so that
    a token can't be guessed from the rest of its word: as many tokens as make up the share, cut in the last word.
    """

    reads: ClassVar[Reads] = "both ways"

    share: float = 0.15
    hidden: float = 0.8
    replaced: float = 0.1
    units: Literal["tokens", "words"] = "tokens"

    def check(self) -> None:
        self.require(0 < self.share <= 1, f"share must be in (0, 1], not {self.share}")
        self.require(min(self.hidden, self.replaced) >= 0, "hidden and replaced can't be negative")
        self.require(self.hidden + self.replaced <= 1, "hidden and replaced are shares that add up to 1 at most")

    def task(self, tokenizer: TextTokenizer, letters: Letters) -> Task:
        if tokenizer.mask_id is None:
            raise DataError("masked language modelling needs a mask token, and this tokenizer has none")
        return _Masked(self, tokenizer.mask_id, letters)


class _Next:
    def ask(self, asked: Asked, guesses: Sequence[Guess]) -> Question:
        labels = np.where(asked.real[:, 1:], asked.ids[:, 1:], IGNORED)
        if asked.documents is not None:
            labels[asked.documents[:, 1:] != asked.documents[:, :-1]] = IGNORED
        return Question(asked.ids[:, :-1], labels)


class _Masked:
    def __init__(self, objective: MaskedTokens, mask: int, letters: Letters) -> None:
        self.objective, self.mask = objective, mask
        self.plain = np.asarray(letters.plain, np.int64)
        self.first, self.last = np.asarray(letters.first, np.bool_), np.asarray(letters.last, np.bool_)
        self.is_plain = np.zeros(len(self.first), np.bool_)
        self.is_plain[self.plain] = True

    def ask(self, asked: Asked, guesses: Sequence[Guess]) -> Question:
        ids, labels = asked.ids[:, :-1].copy(), np.full_like(asked.ids[:, :-1], IGNORED)
        for row, label, real, guess in zip(ids, labels, asked.real[:, :-1], guesses, strict=True):
            open_places = np.nonzero(real & self.is_plain[row])[0]
            if not len(open_places):
                continue
            random = guess.random()
            chosen = self._chosen(row, open_places, random)
            label[chosen] = row[chosen]
            fate = random.random(len(chosen))
            other = self.plain[random.integers(len(self.plain), size=len(chosen))]
            hidden, replaced = fate < self.objective.hidden, fate >= 1 - self.objective.replaced
            row[chosen[hidden]] = self.mask
            row[chosen[replaced]] = other[replaced]
        return Question(ids, labels)

    def _chosen(self, row: Ints, places: Ints, random: np.random.Generator) -> Ints:
        """Return the places of a row that are asked for."""
        count = max(1, round(self.objective.share * len(places)))
        if self.objective.units == "tokens":
            return random.permutation(places)[:count]
        before = places - 1
        goes_on = (before >= 0) & self.first[row[places]] & self.last[row[before]] & self.is_plain[row[before]]
        words = np.cumsum(~goes_on)
        rank = random.permutation(int(words[-1]) + 1)[words]
        return places[np.argsort(rank, kind="stable")][:count]
