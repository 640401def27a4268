"""How a search is done, as data: its width, its length penalty, its limit, and when it may stop.

A hypothesis's length counts the tokens written after the start token, its end token included.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

from polyformer.generate.processors import Processor
from polyformer.spec import Record

if TYPE_CHECKING:
    from torch import Tensor


class SpecialTokens(NamedTuple):
    """The ids that mean something to a search: what starts a hypothesis, what ends it, what fills up a batch."""

    bos: int
    eos: int
    pad: int


@dataclass(frozen=True)
class Hypothesis:
    """One answer of a search.

    Attributes:
        ids: its tokens, without the start and end tokens; with the first one, where a search has it given.
        score: log_probability divided by the length penalty; what hypotheses are compared by.
        log_probability: nats, the sum over its tokens, its end token included.
    """

    ids: list[int]
    score: float
    log_probability: float


class LengthPenalty(Record, abstract=True):
    """What a hypothesis's log-probability is divided by, so that long ones are not at a disadvantage.

    It must rise or fall with the length throughout: the proof that a search may stop looks only at both ends.
    """

    alpha: float

    def divisor(self, length: int) -> float:
        """Return the penalty of a hypothesis of `length` tokens; more than 0."""
        raise NotImplementedError


class Gnmt(LengthPenalty):
    """((5 + length) / 6)^alpha (Wu et al. 2016, section 7, equation 14); alpha 0 compares plain probabilities."""

    alpha: float = 0.6

    def divisor(self, length: int) -> float:
        return float(((5 + length) / 6) ** self.alpha)


class Power(LengthPenalty):
    """length^alpha; with alpha 1 the mean log-probability of a token. What Hugging Face calls `length_penalty`.

    A larger alpha than about 0.6 makes `Safe` stopping late: the longest answer that is allowed could still make
    up for almost anything. Give such a search a limit that follows the source.
    """

    alpha: float = 1.0

    def divisor(self, length: int) -> float:
        return float(length**self.alpha)


class Limit(Record):
    """The longest hypothesis: `tokens` or, if less, per_source · (tokens of the source) + extra.

    `unfinished` says what becomes of a hypothesis that is as long as allowed and has not ended: "cut" takes it as
    it is; "end" makes its last token the end token, at no cost (Hugging Face's `forced_eos_token_id`).
    """

    tokens: int = 256
    per_source: float | None = None
    extra: int = 0
    unfinished: Literal["cut", "end"] = "cut"

    def check(self) -> None:
        self.require(self.tokens >= 1, "tokens must be at least 1")
        self.require(self.per_source is None or self.per_source >= 0, "per_source can't be negative")
        self.require(self.extra >= 0, "extra can't be negative")

    def of(self, source: int) -> int:
        """Return the limit for a source of `source` tokens; at least 1."""
        if self.per_source is None:
            return self.tokens
        return max(1, min(self.tokens, int(self.per_source * source) + self.extra))


class Stopping(Record, abstract=True):
    """When no more is expected of a sentence's live hypotheses."""

    def kept(self, beams: int, nbest: int) -> int:
        """Return how many finished hypotheses must be there, and be beaten, for the search to go on."""
        raise NotImplementedError

    def divisor(self, penalty: LengthPenalty, length: int, limit: int) -> float:
        """Return the penalty at which a live hypothesis of `length` tokens is compared with the finished ones."""
        raise NotImplementedError

    def settled(self, reachable: Tensor, worst: Tensor) -> Tensor:
        """Tell which sentences [N] are done.

        Args:
            reachable: the score [N] of each one's best live hypothesis, by `divisor`.
            worst: the worst score [N] among the finished hypotheses that are kept; -inf while there are too few.
        """
        return reachable <= worst


class Safe(Stopping):
    """Stop when no live hypothesis can get among the n best, whatever it would write: nothing is ever missed.

    Proof. Let a live hypothesis have log-probability p ≤ 0 and `length` tokens. Any way of finishing it has
    log-probability q ≤ p, as the log-probabilities of further tokens are at most 0, and some length between
    length + 1 and the limit. Its score is q / d for a divisor d > 0. Divisors rise or fall with the length
    throughout, so d ≤ D, the larger one of those at both ends; with p ≤ 0 this gives q / d ≤ p / d ≤ p / D. When
    p / D is not more than the worst of the n best finished scores for the most probable live hypothesis, it isn't
    for any, and none can displace a finished one, which wins ties. Sums and quotients in floating point are
    monotone, so that the argument holds for the computed numbers too: a log-probability is computed as a logit
    minus a normaliser that is never less than the logit. Processors that raise scores, such as a positive bias, can
    take the ground from under it.
    """

    def kept(self, beams: int, nbest: int) -> int:
        return nbest

    def divisor(self, penalty: LengthPenalty, length: int, limit: int) -> float:
        return max(penalty.divisor(min(length + 1, limit)), penalty.divisor(limit))


class Hopeful(Stopping):
    """Stop when the best live hypothesis would lose against `beams` finished ones if it ended as it stands.

    Not safe: a longer ending could have a better score after its length penalty. It is what Hugging Face does by
    default (`early_stopping=False`), and therefore what published models were judged with.
    """

    def kept(self, beams: int, nbest: int) -> int:
        return beams

    def divisor(self, penalty: LengthPenalty, length: int, limit: int) -> float:
        return penalty.divisor(length)


class Early(Stopping):
    """Stop as soon as `beams` hypotheses are finished, whatever the live ones may come to.

    What Hugging Face does with `early_stopping=True`, as BART and M2M100 were published.
    """

    def kept(self, beams: int, nbest: int) -> int:
        return beams

    def divisor(self, penalty: LengthPenalty, length: int, limit: int) -> float:
        return penalty.divisor(length)

    def settled(self, reachable: Tensor, worst: Tensor) -> Tensor:
        return worst > float("-inf")


class Diverse(Record):
    """Beams in groups that keep away from each other (diverse beam search: Vijayakumar et al. 2018, section 3).

    At each step the groups choose one after the other, and a token costs `strength` for each hypothesis of an earlier
    group of the same sentence that has just taken it (Hamming diversity). What was paid stays in a hypothesis's score
    and log-probability, as in the authors' search.
    """

    groups: int
    strength: float = 0.5

    def check(self) -> None:
        self.require(self.groups > 1, f"groups must be at least 2, not {self.groups}")
        self.require(0 <= self.strength < 1e6, f"strength must be 0 or more, not {self.strength}")


MOST_BEAMS = 1024


class Search(Record):
    """Beam search; with one beam it is greedy search.

    Attributes:
        beams: how many hypotheses of a sentence live at once.
        nbest: how many are returned.
        penalty, limit, stop: see there.
        forbidden: tokens that are never written, beside the start and padding tokens.
        first: what every hypothesis begins with, at no cost: the code of the language to write in (mBART, M2M100).
        processors: what else is done to the log-probabilities of each hypothesis's next token.
        diverse: beams in groups, each of as many; None for one group.
    """

    beams: int = 4
    nbest: int = 1
    penalty: LengthPenalty = Gnmt()
    limit: Limit = Limit(256, 2.0, 10)
    stop: Stopping = Safe()
    forbidden: tuple[int, ...] = ()
    first: int | None = None
    processors: tuple[Processor, ...] = ()
    diverse: Diverse | None = None

    def check(self) -> None:
        self.require(1 <= self.beams <= MOST_BEAMS, f"beams must be between 1 and {MOST_BEAMS}, not {self.beams}")
        groups = 1 if self.diverse is None else self.diverse.groups
        self.require(self.beams % groups == 0, f"{self.beams} beams can't be shared by {groups} groups evenly")
        self.require(1 <= self.nbest <= self.beams, f"nbest must be between 1 and the {self.beams} beams")

    @property
    def of_a_group(self) -> Search:
        """The search of one group, which finds as many as it can of the n best."""
        if self.diverse is None:
            return self
        beams = self.beams // self.diverse.groups
        return self.replace(beams=beams, nbest=min(beams, self.nbest), diverse=None)
