"""Greedy and beam search: with an encoder–decoder in PyTorch, or with whatever a `Runner` runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from polyformer.errors import SpecError
from polyformer.generate.beams import Beams
from polyformer.generate.candidates import best_after
from polyformer.generate.forests import BatchForest, Forest, SlotForest, Text
from polyformer.generate.processors import Written, in_order, refuse_unknown
from polyformer.generate.runner import Counts, Runner, refuse
from polyformer.generate.settings import Hypothesis, Search, SpecialTokens
from polyformer.parts.adapters import AfterPrefix
from polyformer.parts.model import TransformerPart
from polyformer.parts.positions import Position
from polyformer.spec import Record, walk

JOINING = 8
"""Sentences join when a share of one in so many of all is free: sources are read sooner together than one by one."""


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Switch dropout and its like off, and gradients too; put a model that was being trained back afterwards."""
    training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        model.train(training)


def positions_of(embed: Record | None) -> int | None:
    """Return how many positions an embedding has; None if any number."""
    lengths = [r.length for _, r in walk(embed) if isinstance(r, Position | AfterPrefix)] if embed else []
    return min((length for length in lengths if length is not None), default=None)


def search(
    model: TransformerPart,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    settings: Search,
    tokens: SpecialTokens,
    counts: Counts | None = None,
) -> list[list[Hypothesis]]:
    """Find the best outputs of each sentence of a batch, in PyTorch.

    The memory's keys and values are held once to a sentence, self-attention's once to a live hypothesis. A
    sentence that is done leaves the batch, so that no work is spent on it. A sentence's answer doesn't depend on
    its company, beyond the rounding of sums.

    Args:
        input_ids: [N, T], or [N, P, T] for a model that reads passages.
        attention_mask: of the same shape, non-zero where real; None if all are.
        settings: what to search, and for how long.
        tokens: the target side's special tokens.
        counts: what is done is added to it.
    Returns:
        For each sentence at most `settings.nbest` distinct hypotheses, best first.
    Raises:
        SpecError: a model without encoder, decoder or head; a source longer than its positions; a special or
            forbidden token, or a first one, that is not in its vocabulary.
        RunError: the model gives scores that are no numbers.
    """
    if model.encoder is None or model.decoder is None or model.head is None:
        raise SpecError("searching for an output needs an encoder, a decoder and a head; this model lacks one")
    positions = positions_of(model.spec.target)  # type: ignore[attr-defined]
    ids = input_ids.flatten(1)
    sources = [ids.shape[1]] * len(ids)
    if attention_mask is not None:
        sources = attention_mask.flatten(1).ne(0).sum(1).tolist()
    limits = [_limit(settings, source, positions) for source in sources]
    with evaluating(model):
        memory = model.encode(input_ids, attention_mask)
        forest = BatchForest(model, memory, max(limits), counts or Counts())
        return Searched(forest, settings, tokens, limits, [(tokens.bos,)] * len(limits)).work()


def search_slots(
    runner: Runner,
    texts: Sequence[Text],
    settings: Search,
    tokens: SpecialTokens,
    counts: Counts | None = None,
    progress: Callable[[int], None] | None = None,
) -> list[list[Hypothesis]]:
    """Find the best outputs of texts in the slots of a runner: as many texts at once as it has slots for all beams.

    Long sources come first, and a text that is done makes room for the next. What the runner held before is forgotten.

    Args:
        texts: what to answer, or to continue.
        settings, tokens, counts: as for `search`; `tokens.bos` is not used, since prompts say what comes first.
        progress: called with the number of texts that have been finished newly.
    Returns:
        What `search` does.
    Raises:
        SpecError: fewer slots than beams; a text that is too long for the model, or of tokens that it hasn't.
        RunError: the model gives scores that are no numbers.
    """
    if runner.slots < settings.beams:
        raise SpecError(f"a search with {settings.beams} beams needs as many slots; there are {runner.slots}")
    for text in texts:
        refuse(runner, *text)
    order = sorted(range(len(texts)), key=lambda i: -len(texts[i].source or texts[i].prompt))
    given = [texts[i] for i in order]
    sources = [len(text.source or text.prompt) for text in given]
    ends = [None if runner.positions is None else runner.positions - len(text.prompt) + 1 for text in given]
    limits = [_limit(settings, source, end) for source, end in zip(sources, ends, strict=True)]
    forest = SlotForest(runner, given, counts or Counts())
    try:
        with torch.inference_mode():
            found = Searched(forest, settings, tokens, limits, [text.prompt for text in given], progress).work()
    finally:
        forest.close()
    return [one for _, one in sorted(zip(order, found, strict=True), key=lambda pair: pair[0])]


class Searched:
    """A search under way: groups of hypotheses of the sentences that are in, and how many of all are still to come.

    Args:
        limits, prompts: of each sentence, the longest hypothesis, and what hypotheses follow upon.
    """

    def __init__(
        self,
        forest: Forest,
        settings: Search,
        tokens: SpecialTokens,
        limits: Sequence[int],
        prompts: Sequence[Sequence[int]],
        progress: Callable[[int], None] | None = None,
    ) -> None:
        barred = sorted({tokens.bos, tokens.pad, *settings.forbidden} - {tokens.eos})
        for token in (*barred, tokens.eos, tokens.eos if settings.first is None else settings.first):
            if not 0 <= token < forest.vocabulary:
                raise SpecError(f"there is no token {token} in a vocabulary of {forest.vocabulary:,}")
        refuse_unknown(settings.processors, forest.vocabulary)
        self.settings, self.count, self.progress = settings, len(limits), progress
        forests = [forest]
        if settings.diverse is not None:
            forests += [forest.beside() for _ in range(settings.diverse.groups - 1)]
        self.forbidden = torch.tensor(barred, device=forest.like.device)
        self.groups = [Group(one, settings.of_a_group, tokens, limits, prompts) for one in forests]
        self.most = forest.room(settings.beams)
        self.joined = self.done = 0

    def work(self) -> list[list[Hypothesis]]:
        """Search until all sentences are done; return what was found for each."""
        strength = 0.0 if self.settings.diverse is None else self.settings.diverse.strength
        while self.joined < self.count or any(group.alive for group in self.groups):
            self._join()
            taken: dict[int, Counter[int]] = {}
            for group in self.groups:
                if group.alive:
                    group.step(self.forbidden, taken, strength)
            if self.progress is not None:
                self._report(self.progress)
        if self.settings.diverse is None:
            return self.groups[0].beams.best
        each = [[one for group in self.groups for one in group.beams.best[i]] for i in range(self.count)]
        return [sorted(found, key=lambda one: -one.score)[: self.settings.nbest] for found in each]

    def _join(self) -> None:
        """Let sentences in, if enough can come at once."""
        left, room = self.count - self.joined, self.groups[0].forest.room(self.settings.beams)
        if left and room >= min(left, max(self.most // JOINING, 1)):
            news = range(self.joined, self.joined + min(left, room))
            for group in self.groups:
                group.forest.join(news)
                group.beams.join(news)
            self.joined = news.stop

    def _report(self, progress: Callable[[int], None]) -> None:
        alive = {sentence for group in self.groups for sentence in group.beams.sentences.tolist()}
        done = self.joined - len(alive)
        if done > self.done:
            progress(done - self.done)
        self.done = done


class Group:
    """The hypotheses of one group for all sentences, and where a model holds them. Without diversity, there is one."""

    def __init__(
        self,
        forest: Forest,
        settings: Search,
        tokens: SpecialTokens,
        limits: Sequence[int],
        prompts: Sequence[Sequence[int]],
    ) -> None:
        self.forest, self.prompts = forest, prompts
        self.chain, self.tokens = in_order(settings.processors), tokens
        self.beams = Beams(settings, tokens, limits, [prompt[-1] for prompt in prompts], forest.like)

    @property
    def alive(self) -> bool:
        """Whether any sentence that has joined isn't done."""
        return len(self.beams.sentences) > 0

    def step(self, forbidden: Tensor, taken: dict[int, Counter[int]], strength: float) -> None:
        """Continue every hypothesis by one token.

        Args:
            taken: by sentence, what earlier groups have taken in this step; this one's are added.
            strength: what each of those costs.
        """
        beams, forest = self.beams, self.forest
        last, live = beams.last, beams.live
        if self.chain or any(taken.values()):
            scores = forest.scores(last, live)
            found = best_after(scores, beams.candidates, forbidden, self._change(live, taken, strength))
        else:
            found = forest.best(last, live, beams.candidates, forbidden)
        step = beams.advance(found)
        forest.follow(step)
        if strength:
            width = beams.log_probabilities.shape[1]
            rows = zip(beams.last.tolist(), beams.live.tolist(), strict=True)
            sentences = beams.sentences.tolist()
            for i, (token, is_live) in enumerate(rows):
                if is_live:
                    taken.setdefault(sentences[i // width], Counter())[token] += 1

    def _change(self, live: Tensor, taken: dict[int, Counter[int]], strength: float) -> Callable[[Tensor, int], Tensor]:
        """Return what changes the scores of live rows."""
        beams = self.beams
        width = beams.log_probabilities.shape[1]
        sentences, lengths = beams.sentences.tolist(), beams.lengths.tolist()
        written, rows = beams.written.flatten(0, 1), live.nonzero()[:, 0].tolist()

        def change(likely: Tensor, row: int) -> Tensor:
            row = rows[row]
            sentence = sentences[row // width]
            text = Written(self.prompts[sentence], written[row, : lengths[row // width]].tolist(), (self.tokens.eos,))
            for one in self.chain:
                likely = one.apply(likely, text)
            counts = taken.get(sentence)
            if not counts:
                return likely
            ids = torch.tensor(list(counts), device=likely.device)
            costs = torch.tensor([strength * times for times in counts.values()], device=likely.device)
            return likely.index_add(0, ids, -costs.to(likely.dtype))

        return change


def _limit(settings: Search, source: int, end: int | None) -> int:
    """Return the longest hypothesis for a source, which the decoder's positions limit too."""
    wanted = settings.limit.of(source)
    return wanted if end is None else min(wanted, end)
