"""What is done to a model's scores before a token is chosen by them, as data.

Each processor is a record; a list of them is applied in the order of `rank`, which is the reference library's where it
has one. None of them knows of a model, a batch or chance. Shape letter: V vocabulary.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from polyformer.errors import SpecError
from polyformer.spec import Record

if TYPE_CHECKING:
    from torch import Tensor

NEVER = float("-inf")


@dataclass
class Written:
    """A text as it stands when its next token is chosen.

    Attributes:
        prompt: the ids that were given: a prompt, or a decoder's start tokens.
        ids: those written since.
        ends: the tokens that would end it.
    """

    prompt: Sequence[int]
    ids: list[int] = field(default_factory=list)
    ends: Sequence[int] = ()

    @property
    def all(self) -> list[int]:
        """Prompt and answer."""
        return [*self.prompt, *self.ids]


class Processor(Record, abstract=True):
    """One thing that is done to the scores of one text's next token.

    Attributes:
        rank: where it stands among others; processors of the same rank keep their order.
        draws: whether it only shapes a draw, so that it is left out where the likeliest token is taken.
    """

    rank: ClassVar[int] = 70
    draws: ClassVar[bool] = False

    def apply(self, scores: Tensor, text: Written) -> Tensor:
        """Return other scores [V]; those given stay as they are, and -inf says never."""
        raise NotImplementedError

    def tokens(self) -> Iterable[int]:
        """Yield the ids that it names, which a vocabulary must have."""
        return ()


def in_order(processors: Iterable[Processor]) -> tuple[Processor, ...]:
    """Return processors in the order in which they are applied."""
    return tuple(sorted(processors, key=lambda one: one.rank))


def refuse_unknown(processors: Iterable[Processor], vocabulary: int) -> None:
    """Raise `SpecError` for a processor that names a token which the model doesn't have."""
    for one in processors:
        for token in one.tokens():
            if not 0 <= token < vocabulary:
                told = f"{type(one).__name__} names token {token}, but the vocabulary has {vocabulary:,}"
                raise SpecError(told)


class Biased(Record):
    """What is added to the score of a sequence's last token where the text ends with all before it."""

    sequence: tuple[int, ...]
    bias: float

    def check(self) -> None:
        self.require(len(self.sequence) > 0, "a sequence needs at least one token")
        self.require(abs(self.bias) < 1e30, f"a bias must be a finite number, not {self.bias}")


class LogitBias(Processor):
    """Adds to the scores of tokens, or of tokens behind others; several biases of one token add up."""

    rank = 10

    biases: tuple[Biased, ...]

    def apply(self, scores: Tensor, text: Written) -> Tensor:
        added, before = scores.new_zeros(scores.shape), text.all
        for one in self.biases:
            if follows(before, one.sequence):
                added[one.sequence[-1]] += one.bias
        return scores + added

    def tokens(self) -> Iterable[int]:
        return (token for one in self.biases for token in one.sequence)


class RepetitionPenalty(Processor):
    """Divides the positive scores of all tokens that were there, in the prompt too, and multiplies the negative ones
    (Keskar et al. 2019, section 4.1)."""

    rank = 20

    penalty: float

    def check(self) -> None:
        self.require(0 < self.penalty < 1e6, f"a repetition penalty must be more than 0, not {self.penalty}")

    def apply(self, scores: Tensor, text: Written) -> Tensor:
        there = _numbers(set(text.all), scores)
        old = scores[there]
        return scores.index_copy(0, there, (old * self.penalty).where(old < 0, old / self.penalty))


class PresencePenalty(Processor):
    """Subtracts `penalty` from the scores of tokens that the answer has, however often; negative ones encourage."""

    rank = 21

    penalty: float

    def check(self) -> None:
        self.require(abs(self.penalty) < 1e6, f"a presence penalty must be a finite number, not {self.penalty}")

    def apply(self, scores: Tensor, text: Written) -> Tensor:
        counts = counted(text.ids, scores)
        return scores - self.penalty * (counts > 0).to(scores.dtype)


class FrequencyPenalty(Processor):
    """Subtracts `penalty` for each time that the answer has a token."""

    rank = 22

    penalty: float

    def check(self) -> None:
        self.require(abs(self.penalty) < 1e6, f"a frequency penalty must be a finite number, not {self.penalty}")

    def apply(self, scores: Tensor, text: Written) -> Tensor:
        return scores - self.penalty * counted(text.ids, scores)


class NoRepeatNgram(Processor):
    """Forbids what would make any run of `size` tokens stand in the text, prompt and answer, a second time
    (Paulus et al. 2018, section 2.5)."""

    rank = 30

    size: int

    def check(self) -> None:
        self.require(self.size > 0, f"the size must be at least 1, not {self.size}")

    def apply(self, scores: Tensor, text: Written) -> Tensor:
        ids, before = text.all, self.size - 1
        last = ids[len(ids) - before :]
        places = range(len(ids) - before)
        return forbid(scores, {ids[i + before] for i in places if ids[i : i + before] == last})


class BadWords(Processor):
    """Forbids sequences of tokens: the last of each where the text ends with all before it.

    A sequence that is nothing but a token that ends the text is passed over.
    """

    rank = 40

    sequences: tuple[tuple[int, ...], ...]

    def check(self) -> None:
        self.require(all(self.sequences), "a bad word needs at least one token")

    def apply(self, scores: Tensor, text: Written) -> Tensor:
        before = text.all
        ending = {(end,) for end in text.ends}
        return forbid(scores, {one[-1] for one in self.sequences if one not in ending and follows(before, one)})

    def tokens(self) -> Iterable[int]:
        return (token for one in self.sequences for token in one)


class MinimumLength(Processor):
    """Forbids the end before the answer has `count` tokens."""

    rank = 50

    count: int

    def check(self) -> None:
        self.require(self.count >= 0, f"a length can't be negative, as {self.count}")

    def apply(self, scores: Tensor, text: Written) -> Tensor:
        return forbid(scores, set(text.ends)) if len(text.ids) < self.count else scores


class Suppress(Processor):
    """Forbids tokens throughout."""

    rank = 60

    ids: tuple[int, ...]

    def apply(self, scores: Tensor, text: Written) -> Tensor:
        return forbid(scores, set(self.ids))

    def tokens(self) -> Iterable[int]:
        return self.ids


class SuppressFirst(Processor):
    """Forbids tokens as the answer's first."""

    rank = 61

    ids: tuple[int, ...]

    def apply(self, scores: Tensor, text: Written) -> Tensor:
        return scores if text.ids else forbid(scores, set(self.ids))

    def tokens(self) -> Iterable[int]:
        return self.ids


class Temperature(Processor):
    """Divides scores, so that a draw is bolder above 1 and more careful below."""

    rank, draws = 80, True

    temperature: float

    def check(self) -> None:
        self.require(0 < self.temperature < 1e6, f"temperature must be more than 0 here, not {self.temperature}")

    def apply(self, scores: Tensor, text: Written) -> Tensor:
        return scores / self.temperature


class TopK(Processor):
    """Leaves the `count` likeliest tokens, and those that are as likely as the last of them (Fan et al. 2018)."""

    rank, draws = 81, True

    count: int

    def check(self) -> None:
        self.require(self.count > 0, f"top_k must be at least 1, not {self.count}")

    def apply(self, scores: Tensor, text: Written) -> Tensor:
        least = scores.topk(min(self.count, len(scores))).values[-1]
        return scores.masked_fill(scores < least, NEVER)


class TopP(Processor):
    """Leaves the fewest likeliest tokens whose probabilities reach `mass` (nucleus sampling: Holtzman et al. 2020)."""

    rank, draws = 82, True

    mass: float

    def check(self) -> None:
        self.require(0 < self.mass <= 1, f"top_p must be in (0, 1], not {self.mass}")

    def apply(self, scores: Tensor, text: Written) -> Tensor:
        if self.mass == 1:
            return scores
        rising, places = scores.sort()
        out = rising.softmax(-1).cumsum(-1) <= 1 - self.mass
        out[-1] = False
        return scores.masked_fill(out.new_zeros(out.shape).scatter(0, places, out), NEVER)


class MinP(Processor):
    """Leaves tokens that are at least `share` as likely as the likeliest (Nguyen et al. 2024)."""

    rank, draws = 83, True

    share: float

    def check(self) -> None:
        self.require(0 <= self.share <= 1, f"min_p must be between 0 and 1, not {self.share}")

    def apply(self, scores: Tensor, text: Written) -> Tensor:
        likely = scores.softmax(-1)
        return scores.masked_fill(likely < self.share * likely.max(), NEVER)


class Typical(Processor):
    """Leaves the fewest tokens of probabilities that together reach `mass`, whose surprise is nearest to what is
    expected, the entropy (locally typical sampling: Meister et al. 2023)."""

    rank, draws = 84, True

    mass: float

    def check(self) -> None:
        self.require(0 < self.mass <= 1, f"typical_p must be in (0, 1], not {self.mass}")

    def apply(self, scores: Tensor, text: Written) -> Tensor:
        if self.mass == 1:
            return scores
        surprise = -scores.log_softmax(-1)
        entropy = (surprise * (-surprise).exp()).nansum()
        away, places = (surprise - entropy).abs().sort()
        last = int((scores[places].softmax(-1).cumsum(-1) < self.mass).sum())
        out = away > away[min(last, len(away) - 1)]
        return scores.masked_fill(out.new_zeros(out.shape).scatter(0, places, out), NEVER)


def follows(before: Sequence[int], sequence: Sequence[int]) -> bool:
    """Tell whether a text ends with all of a sequence but its last token."""
    count = len(sequence) - 1
    return count == 0 or (count <= len(before) and list(before[-count:]) == list(sequence[:-1]))


def forbid(scores: Tensor, ids: set[int]) -> Tensor:
    """Return scores with some tokens at -inf."""
    if not ids:
        return scores
    return scores.index_fill(0, _numbers(ids, scores), NEVER)


def counted(ids: Sequence[int], like: Tensor) -> Tensor:
    """Return how often each token stands in a text [V]."""
    counts = like.new_zeros(like.shape)
    for token, count in Counter(ids).items():
        counts[token] = count
    return counts


def _numbers(ids: set[int], like: Tensor) -> Tensor:
    """Return ids in order as an index, where the scores are."""
    import torch  # here, as a text that is written natively, and greedily, has no processors and needs no PyTorch

    return torch.tensor(sorted(ids), device=like.device, dtype=torch.long)
