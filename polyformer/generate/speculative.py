"""Speculative decoding: tokens are guessed cheaply, and the model judges several of them in one pass.

What is written has exactly the distribution that the model would draw from alone (Leviathan et al. 2023, section 2.3
and appendix A), and where nothing is drawn, it is the same tokens. So guesses decide about time only.

Shape letters: K guesses, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, NamedTuple, Protocol

from polyformer.errors import SpecError
from polyformer.generate.processors import Written
from polyformer.generate.runner import Rows, Runner
from polyformer.generate.sampling import Chooser
from polyformer.spec import Record

if TYPE_CHECKING:
    from torch import Tensor

    from polyformer.generate.scores import Scores
    from polyformer.parts.model import TransformerPart


class Guess(NamedTuple):
    """Tokens that may come next, and the probabilities [K, V] that they were drawn by; None if they weren't drawn."""

    ids: list[int]
    chances: Tensor | None = None


class Guesser(Protocol):
    """Guesses how texts go on."""

    @property
    def cost(self) -> float:
        """What a guess costs, as a share of one of the model's own passes."""

    def guess(self, number: int, text: Written, count: int, chooser: Chooser) -> Guess:
        """Return at most `count` tokens for the text of this number; it may be asked of other texts in between."""

    def forget(self, number: int) -> None:
        """Give back what is held for a text, which is finished."""


class PromptLookup:
    """Guesses that a text goes on as it did the last time its last tokens stood in it (Saxena 2023).

    It costs nothing, and helps where an answer repeats what it was given: summaries, corrections, code.
    """

    cost = 0.0

    def __init__(self, longest: int = 3) -> None:
        """Look for the last `longest` tokens, then for fewer."""
        if longest < 1:
            raise SpecError(f"at least the last token must be looked up, not {longest}")
        self.longest = longest

    def guess(self, number: int, text: Written, count: int, chooser: Chooser) -> Guess:
        """Return what stood behind the latest earlier place of the text's end."""
        ids = text.all
        for size in range(min(self.longest, len(ids) - 1), 0, -1):
            end = ids[-size:]
            for start in range(len(ids) - size - 1, -1, -1):
                if ids[start : start + size] == end:
                    return Guess(ids[start + size : start + size + count])
        return Guess([])

    def forget(self, number: int) -> None:
        """Nothing is held."""


class Draft:
    """Guesses by a smaller model of the same vocabulary, or by the model's own first layers.

    It draws its guesses as the text's tokens are drawn, with the same processors.
    """

    def __init__(self, runner: Runner, cost: float) -> None:
        """Take what runs the smaller model, and what one of its passes costs as a share of the large one's."""
        if runner.reads_source:
            raise SpecError("guesses come from a decoder-only model; this one has an encoder")
        self.runner, self.cost = runner, cost
        self._slots: dict[int, int] = {}
        self._held: dict[int, list[int]] = {}

    def guess(self, number: int, text: Written, count: int, chooser: Chooser) -> Guess:
        """Return guesses, as many as there are places for; none where no slot is free."""
        slot = self._slot(number)
        ids = text.all
        room = count if self.runner.positions is None else min(count, self.runner.positions - len(ids))
        if slot is None or room < 1:
            return Guess([])
        self._cut(slot, ids)
        found, chances = Written(text.prompt, list(text.ids), text.ends), []
        for _ in range(room):
            whole = found.all
            held = self._held[slot]
            new = whole[len(held) :]
            scores = self.runner.step(Rows([slot] * len(new), list(range(len(held), len(whole))), new), [len(new) - 1])[
                0
            ]
            held.extend(new)
            likely = chooser.chances(scores, found)
            chances.append(likely)
            found.ids.append(chooser.draw(likely))
        import torch

        return Guess(found.ids[len(text.ids) :], torch.stack(chances))

    def forget(self, number: int) -> None:
        """Empty the text's slot."""
        slot = self._slots.pop(number, None)
        if slot is not None:
            self.runner.clear(slot)
            del self._held[slot]

    def _slot(self, number: int) -> int | None:
        if number not in self._slots:
            free = next((one for one in range(self.runner.slots) if one not in self._held), None)
            if free is None:
                return None
            self._slots[number] = free
            self._held[free] = []
        return self._slots[number]

    def _cut(self, slot: int, ids: Sequence[int]) -> None:
        """Forget what was guessed and didn't come; the last token is always computed, for its scores."""
        held = self._held[slot]
        if self.runner.length(slot) != len(held):  # an interrupt came between
            self.runner.truncate(slot, 0)
            held.clear()
        most = min(len(held), len(ids) - 1)
        shared = next((i for i in range(most) if held[i] != ids[i]), most)
        if shared < len(held):
            shared = shared if shared >= self.runner.earliest(slot) else 0
            self.runner.truncate(slot, shared)
            del held[shared:]


class Speculation(Record):
    """How far is guessed, and when it is given up.

    Attributes:
        count: guesses at a time, at most.
        trial: passes after which it is decided anew whether guessing pays.
        least: a text goes on without guesses when each pass has written fewer tokens in the mean than this and what
            its guesses cost. It is more than 1, as judging costs time too.
    """

    count: int = 4
    trial: int = 8
    least: float = 1.3

    def check(self) -> None:
        self.require(0 < self.count <= 64, f"count must be between 1 and 64, not {self.count}")
        self.require(self.trial > 0, f"trial must be at least 1, not {self.trial}")
        self.require(1 <= self.least < 65, f"least must be between 1 and 65, not {self.least}")


@dataclass
class Guesses:
    """How guessing has gone.

    Attributes:
        passes: those that judged guesses.
        guessed, taken: tokens guessed, and those of them that were taken.
        stopped: texts that went on without guesses, as these didn't pay.
    """

    passes: int = 0
    guessed: int = 0
    taken: int = 0
    stopped: int = 0

    def note(self, guessed: int, taken: int) -> None:
        """Count a pass."""
        self.passes, self.guessed, self.taken = self.passes + 1, self.guessed + guessed, self.taken + taken

    def add(self, other: Guesses) -> None:
        """Count another's too."""
        for name in ("passes", "guessed", "taken", "stopped"):
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def to_data(self) -> dict[str, float]:
        """Return all figures."""
        return {"acceptance": self.acceptance, "gain": self.gain, **asdict(self)}

    @property
    def acceptance(self) -> float:
        """The share of guesses that were taken."""
        return self.taken / self.guessed if self.guessed else 0.0

    @property
    def gain(self) -> float:
        """How many tokens a pass has written in the mean; 1 is what it writes without guesses."""
        return 1 + self.taken / self.passes if self.passes else 1.0


@dataclass
class Trial:
    """Decides for one text whether guessing pays, by `cost` of a guess."""

    settings: Speculation
    cost: float
    recent: Guesses = field(default_factory=Guesses)
    stopped: bool = False

    def note(self, guessed: int, taken: int) -> None:
        """Count a pass."""
        self.recent.note(guessed, taken)
        if self.recent.passes >= self.settings.trial:
            spent = self.cost * self.recent.guessed / self.recent.passes
            self.stopped = self.recent.gain < self.settings.least + spent
            self.recent = Guesses()


def judge(scores: Scores, guess: Guess, text: Written, chooser: Chooser) -> list[int]:
    """Return the guesses that are taken and one token more, which is the model's own.

    A guess x that was drawn by q is taken with the probability min(1, p(x) / q(x)), and the first that isn't is
    replaced by a draw from max(0, p - q); a guess that wasn't drawn counts as one that was certain.

    Args:
        scores: the model's [K + 1, V], behind the text and behind each guess.
        text: as it stands before the guesses; it isn't changed.
    """
    seen = Written(text.prompt, list(text.ids), text.ends)
    for i, token in enumerate(guess.ids):
        p = chooser.chances(scores[i], seen)
        if guess.chances is None:
            q = p.new_zeros(p.shape)
            q[token] = 1.0
        else:
            q = guess.chances[i].to(p)
        if chooser.uniform() * float(q[token]) >= float(p[token]):
            rest = (p - q).clamp(min=0)
            seen.ids.append(chooser.draw(rest if bool(rest.sum() > 0) else p))
            return seen.ids[len(text.ids) :]
        seen.ids.append(token)
        if token in text.ends:
            return seen.ids[len(text.ids) :]
    seen.ids.append(chooser.choose(scores[-1], seen))
    return seen.ids[len(text.ids) :]


def early_exit(model: TransformerPart, blocks: int) -> TransformerPart:
    """Return the model's first blocks with its head, on the same tensors: a draft that takes no memory of its own.

    It guesses well where the model was trained so (LayerSkip: Elhoushi et al. 2024), and badly elsewhere.

    Raises:
        SpecError: a decoder that is no `Stack`, or has no more blocks than are asked for.
    """
    from polyformer.parts import Stack, Transformer
    from polyformer.parts.model import TransformerPart

    spec = model.spec
    assert isinstance(spec, Transformer)
    if not isinstance(spec.decoder, Stack) or not 0 < blocks < len(spec.decoder.blocks):
        have = len(spec.decoder.blocks) if isinstance(spec.decoder, Stack) else 0
        raise SpecError(f"a draft needs some, but not all, of a stack's blocks; {blocks} of {have} can't be taken")
    first = spec.replace(decoder=spec.decoder.replace(blocks=spec.decoder.blocks[:blocks]))
    draft = first.build("meta")
    assert isinstance(draft, TransformerPart)
    held = model.state_dict()
    draft.load_state_dict({name: held[name] for name in draft.state_dict()}, assign=True)
    draft.tie()
    return draft.eval()
