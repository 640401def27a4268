"""The hypotheses of many sentences: which live, which are finished, and when a sentence is done.

Nothing here knows of a model. Shape letters: N sentences, W live hypotheses of each, C candidates of a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from polyformer.errors import RunError
from polyformer.generate.candidates import Candidates
from polyformer.generate.settings import Hypothesis, Search, SpecialTokens

NEVER = float("-inf")
ROOM = 32
"""Tokens of a hypothesis that there is room for at first."""


@dataclass
class Step:
    """What a step asks of those who hold the model's caches.

    Attributes:
        rows: integers [N' · W'], for each row that lives on the row that it continues.
        live: truths [N' · W'], which of them are real; the others only fill up their sentence's share.
        sentences: integers [N'], which sentences stay; None if all do.
    """

    rows: Tensor
    live: Tensor
    sentences: Tensor | None


class Beams:
    """Hypotheses of sentences that come and go. There is one to a sentence at first, the empty one.

    At each step the best 2·beams continuations of a sentence are looked at (with one beam: the best one). Those
    among the first `beams` that end are finished; the best `beams` of those that don't end live on. Hence a
    hypothesis that ends takes no room from the others. Continuations that are equally good are taken in the order
    of the hypotheses that they continue, and then of their ids. One whose probability is nothing is dead: it fills up
    its sentence's share of W rows, and no model is asked about it.

    Args:
        limits: the longest hypothesis of each sentence.
        starts: what each sentence's hypotheses follow upon, a token.
        like: a tensor of the model's; sums are kept on its device and in its precision, float32 at least.
    """

    def __init__(
        self, settings: Search, tokens: SpecialTokens, limits: Sequence[int], starts: Sequence[int], like: Tensor
    ) -> None:
        device, self.precision = like.device, torch.promote_types(like.dtype, torch.float32)
        self.settings, self.tokens = settings, tokens
        self.kept = settings.stop.kept(settings.beams, settings.nbest)
        self.finished: list[list[Hypothesis]] = [[] for _ in limits]
        self._limits, self._starts = (torch.tensor(each, device=device) for each in (limits, starts))
        self.sentences = torch.zeros(0, dtype=torch.long, device=device)
        self.lengths, self.limits, self.starts = self.sentences, self.sentences, self.sentences
        self.log_probabilities = torch.zeros(0, 1, dtype=self.precision, device=device)
        self.written = torch.zeros(0, 1, ROOM, dtype=torch.long, device=device)
        self.worst = self.log_probabilities[:, 0]

    def join(self, sentences: Sequence[int]) -> None:
        """Let sentences in, each with the empty hypothesis."""
        news, device = torch.tensor(sentences, device=self.sentences.device), self.sentences.device
        width = self.log_probabilities.shape[1] if len(self.sentences) else 1
        empty = torch.full((len(news), width), NEVER, dtype=self.precision, device=device)
        empty[:, 0] = 0.0
        unwritten = torch.zeros(len(news), width, self.written.shape[2], dtype=torch.long, device=device)
        if len(self.sentences):
            empty = torch.cat((self.log_probabilities, empty))
            unwritten = torch.cat((self.written, unwritten))
        self.log_probabilities, self.written = empty, unwritten
        self.sentences = torch.cat((self.sentences, news))
        self.lengths = torch.cat((self.lengths, torch.zeros_like(news)))
        self.limits = torch.cat((self.limits, self._limits[news]))
        self.starts = torch.cat((self.starts, self._starts[news]))
        self.worst = torch.cat((self.worst, torch.full_like(empty[len(empty) - len(news) :, 0], NEVER)))

    @property
    def candidates(self) -> int:
        """How many continuations of each row can matter."""
        beams = self.settings.beams
        return 2 * beams if beams > 1 else 1

    @property
    def live(self) -> Tensor:
        """Which rows are real, truths [N · W]."""
        return self.log_probabilities.flatten() > NEVER

    @property
    def last(self) -> Tensor:
        """The token that each hypothesis ends with, [N · W]: what the model reads next."""
        width = self.written.shape[1]
        place = (self.lengths - 1).clamp(min=0)[:, None, None].expand(-1, width, 1)
        found = self.written.gather(2, place)[:, :, 0]
        return torch.where(self.lengths[:, None] == 0, self.starts[:, None], found).flatten()

    @property
    def best(self) -> list[list[Hypothesis]]:
        """The n best finished hypotheses of each sentence."""
        return [found[: self.settings.nbest] for found in self.finished]

    def advance(self, found: Candidates) -> Step:
        """Continue every live hypothesis by one token.

        Args:
            found: continuations of each live row [R, C].
        Raises:
            RunError: the model gave a score that is no number.
        """
        sentences, width = self.log_probabilities.shape
        self.lengths = self.lengths + 1
        at_limit = self.limits == self.lengths
        following, ids = (tensor.view(sentences, width, -1) for tensor in self._of_all_rows(found))
        if self.settings.first is not None:
            following, ids = _certain(self.settings.first, following, ids, self.lengths == 1)
        if self.settings.limit.unfinished == "end":
            following, ids = _certain(self.tokens.eos, following, ids, at_limit)
        totals, places = (self.log_probabilities[:, :, None] + following).flatten(1).sort(descending=True, stable=True)
        totals, places = totals[:, : self.candidates], places[:, : self.candidates]
        if not bool(totals[:, 0].isfinite().all()):
            raise RunError("the model gave scores that are no numbers (NaN or infinite); its weights are damaged")
        parents = places // following.shape[-1]
        ids = ids.flatten(1).gather(1, places)
        ends = ids == self.tokens.eos
        self._finish(totals, parents, ids, ends | at_limit[:, None])

        alive, order = totals.masked_fill(ends, NEVER).sort(descending=True, stable=True)
        alive, order = alive[:, : self.settings.beams], order[:, : self.settings.beams]
        parents, ids = parents.gather(1, order), ids.gather(1, order)
        going_on = (~(at_limit | self._settled(alive[:, 0]))).nonzero()[:, 0]
        all_stay = len(going_on) == sentences
        if not all_stay:
            alive, parents, ids = alive[going_on], parents[going_on], ids[going_on]
            for name in ("limits", "sentences", "lengths", "starts", "worst"):
                setattr(self, name, getattr(self, name)[going_on])
        self.log_probabilities = alive
        self._write(going_on, parents, ids)
        rows = (going_on[:, None] * width + parents).flatten()
        return Step(rows, self.live, None if all_stay else going_on)

    def _of_all_rows(self, found: Candidates) -> tuple[Tensor, Tensor]:
        """Give dead rows their place among the live ones, with continuations as dead as they are."""
        live = self.live
        if len(found.ids) == len(live):
            return found.log_probabilities, found.ids
        likely = found.log_probabilities.new_full((len(live), found.ids.shape[1]), NEVER)
        ids = found.ids.new_zeros(likely.shape)
        likely[live], ids[live] = found.log_probabilities, found.ids
        return likely, ids

    def _write(self, going_on: Tensor, parents: Tensor, ids: Tensor) -> None:
        """Put tokens [N', W'] behind those of the hypotheses that they continue."""
        if len(going_on) and int(self.lengths.max()) > self.written.shape[2]:
            self.written = torch.cat((self.written, torch.zeros_like(self.written)), 2)
        self.written = self.written[going_on[:, None], parents]
        self.written.scatter_(2, (self.lengths - 1)[:, None, None].expand(-1, ids.shape[1], 1), ids[:, :, None])

    def _finish(self, totals: Tensor, parents: Tensor, ids: Tensor, ending: Tensor) -> None:
        """Keep those of the first `beams` candidates [N, C] that end and are better than the worst one kept."""
        beams, penalty = self.settings.beams, self.settings.penalty
        lengths = self.lengths.tolist()
        scores = totals[:, :beams] / totals.new_tensor([penalty.divisor(length) for length in lengths])[:, None]
        accepted = ending[:, :beams] & (scores > self.worst[:, None])
        for row, rank in accepted.nonzero().tolist():
            last, before = int(ids[row, rank]), lengths[row] - 1
            tokens = self.written[row, parents[row, rank], :before].tolist()
            tokens += [] if last == self.tokens.eos else [last]
            kept = self.finished[int(self.sentences[row])]
            kept.append(Hypothesis(tokens, float(scores[row, rank]), float(totals[row, rank])))
            kept.sort(key=lambda hypothesis: -hypothesis.score)
            del kept[self.kept :]
            if len(kept) == self.kept:
                self.worst[row] = kept[-1].score

    def _settled(self, best_alive: Tensor) -> Tensor:
        """Return for each sentence whether its best live hypothesis [N] can be given up."""
        stop, penalty = self.settings.stop, self.settings.penalty
        lengths = zip(self.lengths.tolist(), self.limits.tolist(), strict=True)
        divisors = [stop.divisor(penalty, length, limit) for length, limit in lengths]
        reachable = best_alive / best_alive.new_tensor(divisors)
        return stop.settled(reachable, self.worst) | (best_alive == NEVER)


def _certain(token: int, following: Tensor, ids: Tensor, where: Tensor) -> tuple[Tensor, Tensor]:
    """Leave the hypotheses of some sentences [N] nothing but one token, at no cost: [N, W, C] -> the same."""
    if not bool(where.any()):
        return following, ids
    certain = torch.full_like(following, NEVER)
    certain[:, :, 0] = 0.0
    here = where[:, None, None]
    return torch.where(here, certain, following), torch.where(here, token, ids)
