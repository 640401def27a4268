"""The hypotheses of a batch of sentences: which live, which are finished, and when a sentence is done.

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


@dataclass
class Step:
    """What a step asks of the model's cache.

    Attributes:
        rows: integers [N' · W'], for each row that lives on the row that it continues.
        sentences: integers [N'], which sentences stay; None if all do.
    """

    rows: Tensor
    sentences: Tensor | None


class Beams:
    """Hypotheses of a batch. There is one to a sentence at first, the empty one.

    At each step the best 2·beams continuations of a sentence are looked at (with one beam: the best one). Those
    among the first `beams` that end are finished; the best `beams` of those that don't end live on. Hence a
    hypothesis that ends takes no room from the others. Continuations that are equally good are taken in the order
    of the hypotheses that they continue, and then of their ids.

    Args:
        limits: the longest hypothesis of each sentence.
        like: a tensor of the model's; sums are kept on its device and in its precision, float32 at least.
    """

    def __init__(self, settings: Search, tokens: SpecialTokens, limits: Sequence[int], like: Tensor) -> None:
        count, device = len(limits), like.device
        precision = torch.promote_types(like.dtype, torch.float32)
        self.settings, self.tokens = settings, tokens
        self.kept = settings.stop.kept(settings.beams, settings.nbest)
        self.finished: list[list[Hypothesis]] = [[] for _ in limits]
        self.length = 0
        self.limits = torch.tensor(limits, device=device)
        self.sentences = torch.arange(count, device=device)
        self.log_probabilities = torch.zeros(count, 1, dtype=precision, device=device)
        self.written = torch.zeros(count, 1, 0, dtype=torch.long, device=device)
        self.worst = torch.full((count,), float("-inf"), dtype=precision, device=device)

    @property
    def candidates(self) -> int:
        """How many continuations of each row can matter."""
        beams = self.settings.beams
        return 2 * beams if beams > 1 else 1

    @property
    def last(self) -> Tensor:
        """The token that each live hypothesis ends with, [N · W, 1]: what the model reads next."""
        if self.length == 0:
            return self.written.new_full((len(self.limits), 1), self.tokens.bos)
        return self.written[:, :, -1].reshape(-1, 1)

    @property
    def best(self) -> list[list[Hypothesis]]:
        """The n best finished hypotheses of each sentence."""
        return [found[: self.settings.nbest] for found in self.finished]

    def advance(self, found: Candidates) -> Step:
        """Continue every live hypothesis by one token.

        Args:
            found: continuations of each row [N · W, C].
        Raises:
            RunError: the model gave a score that is no number.
        """
        sentences, width = self.log_probabilities.shape
        self.length += 1
        at_limit = self.limits == self.length
        following, ids = (tensor.view(sentences, width, -1) for tensor in found)
        if self.length == 1 and self.settings.first is not None:
            following, ids = _certain(self.settings.first, following, ids, torch.ones_like(at_limit))
        if self.settings.limit.unfinished == "end" and bool(at_limit.any()):
            following, ids = _certain(self.tokens.eos, following, ids, at_limit)
        totals, places = (self.log_probabilities[:, :, None] + following).flatten(1).sort(descending=True, stable=True)
        totals, places = totals[:, : self.candidates], places[:, : self.candidates]
        if not bool(totals[:, 0].isfinite().all()):
            raise RunError("the model gave scores that are no numbers (NaN or infinite); its weights are damaged")
        parents = places // following.shape[-1]
        ids = ids.flatten(1).gather(1, places)
        ends = ids == self.tokens.eos
        self._finish(totals, parents, ids, ends | at_limit[:, None])

        alive, order = totals.masked_fill(ends, float("-inf")).sort(descending=True, stable=True)
        alive, order = alive[:, : self.settings.beams], order[:, : self.settings.beams]
        parents, ids = parents.gather(1, order), ids.gather(1, order)
        going_on = (~(at_limit | self._settled(alive[:, 0]))).nonzero()[:, 0]
        all_stay = len(going_on) == sentences
        if not all_stay:
            alive, parents, ids = alive[going_on], parents[going_on], ids[going_on]
            self.limits, self.sentences = self.limits[going_on], self.sentences[going_on]
            self.worst = self.worst[going_on]
        self.log_probabilities = alive
        self.written = torch.cat((self.written[going_on[:, None], parents], ids[:, :, None]), 2)
        return Step((going_on[:, None] * width + parents).flatten(), None if all_stay else going_on)

    def _finish(self, totals: Tensor, parents: Tensor, ids: Tensor, ending: Tensor) -> None:
        """Keep those of the first `beams` candidates [N, C] that end and are better than the worst one kept."""
        beams = self.settings.beams
        scores = totals[:, :beams] / self.settings.penalty.divisor(self.length)
        accepted = ending[:, :beams] & (scores > self.worst[:, None])
        for row, rank in accepted.nonzero().tolist():
            last = int(ids[row, rank])
            tokens = self.written[row, parents[row, rank]].tolist() + ([] if last == self.tokens.eos else [last])
            kept = self.finished[int(self.sentences[row])]
            kept.append(Hypothesis(tokens, float(scores[row, rank]), float(totals[row, rank])))
            kept.sort(key=lambda hypothesis: -hypothesis.score)
            del kept[self.kept :]
            if len(kept) == self.kept:
                self.worst[row] = kept[-1].score

    def _settled(self, best_alive: Tensor) -> Tensor:
        """Return for each sentence whether its best live hypothesis [N] can be given up."""
        settings = self.settings
        divisors = [settings.stop.divisor(settings.penalty, self.length, limit) for limit in self.limits.tolist()]
        reachable = best_alive / best_alive.new_tensor(divisors)
        return settings.stop.settled(reachable, self.worst) | (best_alive == float("-inf"))


def _certain(token: int, following: Tensor, ids: Tensor, where: Tensor) -> tuple[Tensor, Tensor]:
    """Leave the hypotheses of some sentences [N] nothing but one token, at no cost: [N, W, C] -> the same."""
    certain = torch.full_like(following, float("-inf"))
    certain[:, :, 0] = 0.0
    here = where[:, None, None]
    return torch.where(here, certain, following), torch.where(here, token, ids)
