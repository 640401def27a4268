"""Conversations and prompts with their completions, as a model is tuned on them: only its own words are asked for.

Which tokens those are is not guessed from a text that a template has made: the template is run so that the strings of
the model's own messages know where they end up. A turn's end token belongs to it, since that is how the model stops.

Shape letters: B rows of a batch, S tokens of a row.
"""

from __future__ import annotations

import bisect
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from polyformer.data.batches import Column, cuts
from polyformer.data.chat import ChatTemplate
from polyformer.data.checkpoint_tokenizer import Placed, TextTokenizer
from polyformer.data.examples import Example
from polyformer.data.reader import IGNORED, Ints, Reader
from polyformer.data.rows import TextBatch
from polyformer.data.templates.origin import Span, spans
from polyformer.errors import DataError
from polyformer.spec import Record

ASSISTANT = "assistant"

Prompts = Literal["chat", "plain"]
Packing = Literal["apart", "joined", "padded"]


class TurnRecipe(Record):
    """How conversations are put into rows and batches.

    Attributes:
        length: the most tokens of a row; what is longer is cut at its end, and counted. None: the model's own, or 1024.
        tokens: the most tokens of a batch.
        packing: "apart" puts several conversations into a row and keeps them apart by `SameDocument`; "joined" lets
            them see those before them; "padded" gives each a row of its own. None: apart where the model's parts can.
        seed: of the order.
    """

    length: int | None = None
    tokens: int = 2048
    packing: Packing | None = None
    seed: int = 0

    def check(self) -> None:
        self.require(self.length is None or self.length >= 2, f"length should be at least 2, not {self.length}")
        self.require(self.tokens >= 2, f"tokens should be at least 2, not {self.tokens}")


class Turns(NamedTuple):
    """One example: its ids, and which of them the model is asked for."""

    ids: list[int]
    asked: list[bool]


@dataclass
class EncodedTurns:
    """Encoded examples that have something to learn from.

    Attributes:
        ids: of each.
        asked: booleans, laid out as `ids`: which tokens are asked for.
        pad_id: to fill up with.
        cut: how many were longer than a row, and lost their end.
        lost: how many lost all that is asked for by that, and were left out.
        endless: how many have a turn of the model without an end token.
    """

    ids: Column
    asked: npt.NDArray[np.bool_]
    pad_id: int
    cut: int = 0
    lost: int = 0
    endless: int = 0

    def __len__(self) -> int:
        return len(self.ids.lengths)

    @property
    def notes(self) -> list[str]:
        """What a person should know of how the examples fit."""
        told = [f"{len(self):,} with {int(self.ids.lengths.sum()):,} tokens, {int(self.asked.sum()):,} asked for"]
        if self.cut:
            told.append(f"cut at the end to fit a row: {self.cut:,}")
        if self.lost:
            told.append(f"left out, since the whole answer was cut away: {self.lost:,}")
        if self.endless:
            told.append(f"with a turn that the template doesn't end by a control token: {self.endless:,}")
        return told


@dataclass
class Renderer:
    """Turns examples of one tokenizer into ids, with what is asked for.

    Attributes:
        tokenizer: the model's.
        prompts: how a prompt and its completion are put: as a user's and the model's messages, or one behind the other.
        before: ids that the model is given before every text, as a trained prompt has.
    """

    tokenizer: TextTokenizer
    prompts: Prompts
    before: tuple[int, ...] = ()
    known: set[str] = field(default_factory=lambda: {ASSISTANT})

    def __post_init__(self) -> None:
        source = self.tokenizer.chat_template
        self.template = None if source is None else ChatTemplate(source, self.tokenizer.special_tokens)
        self.control = {self.tokenizer.token_id(token) for token in self.tokenizer.control}

    def turns(self, example: Example) -> tuple[Turns, bool]:
        """Return an example's ids with what is asked for, and whether each turn of the model ends in a control token.

        Raises:
            DataError: a conversation without a turn of the model, a role that the template doesn't write, a model
                without a chat template, messages that the template refuses; it names file and line.
        """
        data = example.data
        if "messages" not in data and self.prompts == "plain":
            found, ended = (
                self._plain(data["prompt"], data["completion"], example.where),
                self.tokenizer.eos_id is not None,
            )
        else:
            messages = data["messages"] if "messages" in data else as_messages(data)
            try:
                found, ended = self._chat(messages, data.get("tools"))
            except DataError as error:
                raise DataError(f"{example.where}: {error}") from None
        return Turns([*self.before, *found.ids], [False] * len(self.before) + found.asked), ended

    def prompt(self, data: Mapping[str, Any]) -> tuple[list[int], str, str]:
        """Return what a model is given to say an example's last answer: ids, the text of it, and what stands there."""
        if "messages" not in data and self.prompts == "plain":
            return [*self.before, *self._before(data["prompt"])], data["prompt"], data["completion"]
        assert self.template is not None
        messages = data["messages"] if "messages" in data else as_messages(data)
        last = max(i for i, message in enumerate(messages) if message.get("role") == ASSISTANT)
        text = self.template.render(messages[:last], data.get("tools"))
        answer = messages[last].get("content")
        ids = [*self.before, *self.tokenizer.encode_rendered(text)]
        return ids, str(text), answer if isinstance(answer, str) else str(answer)

    def _plain(self, prompt: str, completion: str, where: str) -> Turns:
        if not completion:
            raise DataError(f"{where} has an empty completion, from which nothing can be learnt")
        before, (after,) = self._before(prompt), self.tokenizer.encode_bare([completion])
        end = [] if self.tokenizer.eos_id is None else [self.tokenizer.eos_id]
        own = [*after, *end]
        return Turns([*before, *own], [False] * len(before) + [True] * len(own))

    def _before(self, prompt: str) -> list[int]:
        """Return a prompt as the model will be given it: with what its tokenizer puts before a text, not behind it."""
        ids, (bare,) = self.tokenizer.encode(prompt), self.tokenizer.encode_bare([prompt])
        behind = next((n for n in range(3) if ids[len(ids) - n - len(bare) : len(ids) - n] == bare), 0)
        kept = ids[: len(ids) - behind]
        return kept or [one for one in (self.tokenizer.bos_id, self.tokenizer.eos_id) if one is not None][:1]

    def _chat(self, messages: Sequence[Any], tools: Any) -> tuple[Turns, bool]:
        if self.template is None:
            raise DataError("this model's tokenizer has no chat template; give prompt and completion, or text")
        roles = [message.get("role") for message in messages if isinstance(message, Mapping)]
        if ASSISTANT not in roles:
            raise DataError("the conversation has no turn of the assistant, so there is nothing to learn from it")
        text = self.template.render(messages, tools, add_generation_prompt=False)
        for role in dict.fromkeys(roles):
            if isinstance(role, str) and role not in self.known:
                if not spans(self.template.said_by(role, messages, tools)) and _speaks(role, messages):
                    raise DataError(f"the chat template writes nothing of a message whose role is '{role}'")
                self.known.add(role)
        own = spans(self.template.said_by(ASSISTANT, messages, tools))
        if not own:
            raise DataError("the assistant's turns are empty, or the chat template writes nothing of them")
        placed = self.tokenizer.encode_rendered_places(text)
        asked = _inside(placed, own)
        ended = self._with_ends(placed, asked, text)
        return Turns([one.id for one in placed], asked), ended

    def _with_ends(self, placed: Sequence[Placed], asked: list[bool], text: str) -> bool:
        """Ask for the control token that ends each turn, with the spaces before it; tell whether each has one."""
        every = True
        for last in [i for i, own in enumerate(asked) if own and asked[i + 1 : i + 2] != [True]]:
            at = last + 1
            while at < len(placed) and placed[at].id not in self.control and _blank(text, placed[at]):
                at += 1
            found = at < len(placed) and placed[at].id in self.control
            if found:
                asked[last + 1 : at + 1] = [True] * (at - last)
            every = every and found
        return every


def as_messages(data: Mapping[str, Any]) -> list[dict[str, str]]:
    """Return a prompt and its completion as a conversation."""
    return [{"role": "user", "content": data["prompt"]}, {"role": ASSISTANT, "content": data["completion"]}]


def encode_turns(renderer: Renderer, examples: Iterable[Example], length: int) -> EncodedTurns:
    """Encode examples once and for all, each cut to `length` tokens that a model reads, and one more to be said.

    Raises:
        DataError: as `Renderer.turns` does; or the answers of all examples are cut away.
    """
    ids, asked = list[list[int]](), list[bool]()
    cut = lost = endless = 0
    for example in examples:
        turns, ended = renderer.turns(example)
        endless += not ended
        cut += len(turns.ids) > length + 1
        own = turns.asked[: length + 1]
        if not any(own[1:]):
            lost += 1
            continue
        ids.append(turns.ids[: length + 1])
        asked += own
    if not ids:
        told = f"all {lost:,} answers stand behind the {length:,} tokens of a row, and would be cut away"
        raise DataError(f"{told}; raise batch.length" if lost else "there are no examples")
    tokenizer = renderer.tokenizer
    pad = tokenizer.eos_id if tokenizer.pad_id is None else tokenizer.pad_id
    return EncodedTurns(Column(ids), np.asarray(asked, np.bool_), pad or 0, cut, lost, endless)


class TurnRows(Reader[TextBatch]):
    """An endless iterator of batches of rows of examples; each example comes once in an epoch.

    Rows of about equal lengths stand in one batch. Which examples share a row is the same in every epoch.
    """

    what = "examples"

    def __init__(self, data: EncodedTurns, recipe: TurnRecipe, length: int) -> None:
        """Plan rows of at most `length` tokens, and the batches."""
        self.data, self.recipe, self.length = data, recipe, length
        lengths = data.ids.lengths - 1
        self.rows = [[i] for i in range(len(data))] if recipe.packing == "padded" else packed(lengths, length)
        self.filled: Ints = np.asarray([int(lengths[row].sum()) for row in self.rows], np.int64)
        items = np.argsort(self.filled, kind="stable")
        super().__init__(items, cuts(self.filled[items], max(recipe.tokens, length)))

    def fingerprint(self) -> str:
        digest = hashlib.sha256(f"{self.recipe.to_json()}{self.length}".encode())
        for array in (self.data.ids.starts, self.data.ids.flat, self.data.asked):
            digest.update(array.tobytes())
        return digest.hexdigest()[:16]

    def shuffled(self) -> tuple[Ints, Ints]:
        """Return this epoch's rows, still by length, and its order of the batches."""
        random = np.random.default_rng([self.recipe.seed, self.epoch])
        mixed = random.permutation(len(self.rows))
        return mixed[np.argsort(self.filled[mixed], kind="stable")], random.permutation(len(self))

    def collate(self, chosen: Ints, epoch: int | None = None) -> TextBatch:
        """Put these rows into a batch, padded on the right."""
        width = int(self.filled[chosen].max())
        shape = (len(chosen), width)
        ids, labels = np.full(shape, self.data.pad_id, np.int64), np.full(shape, IGNORED, np.int64)
        documents = np.zeros(shape, np.int64)
        starts, flat = self.data.ids.starts, self.data.ids.flat
        for line, row in enumerate(chosen.tolist()):
            at = 0
            for number, one in enumerate(self.rows[row]):
                start, stop = int(starts[one]), int(starts[one + 1])
                end = at + stop - start - 1
                ids[line, at:end] = flat[start : stop - 1]
                labels[line, at:end] = np.where(self.data.asked[start + 1 : stop], flat[start + 1 : stop], IGNORED)
                documents[line, at:] = number
                at = end
        real = np.arange(width) < self.filled[chosen][:, None]
        apart = self.recipe.packing != "joined" and bool(documents.any())
        return TextBatch(
            torch.from_numpy(ids),
            torch.from_numpy(labels),
            None if real.all() else torch.from_numpy(real),
            torch.from_numpy(documents) if apart else None,
            int((labels >= 0).sum()),
            chosen,
        )


def packed(lengths: Ints, room: int) -> list[list[int]]:
    """Return which examples share a row: the longest first, each into the fullest row that has room for it."""
    rows: list[list[int]] = []
    free: list[tuple[int, int]] = []  # room that is left, and the row, in order
    for one in np.argsort(-lengths, kind="stable").tolist():
        size = int(lengths[one])
        place = bisect.bisect_left(free, (size, -1))
        if place < len(free):
            left, row = free.pop(place)
        else:
            left, row = room, len(rows)
            rows.append([])
        rows[row].append(one)
        bisect.insort(free, (left - size, row))
    return rows


def _inside(placed: Sequence[Placed], own: Sequence[Span]) -> list[bool]:
    """Tell which tokens stand in one of the spans, if only in part; one without extent goes with the one before it."""
    starts, found = [start for start, _ in own], list[bool]()
    for one in placed:
        if one.start == one.stop:
            found.append(bool(found) and found[-1])
            continue
        before = bisect.bisect_left(starts, one.stop) - 1
        found.append(before >= 0 and own[before][1] > one.start)
    return found


def _blank(text: str, one: Placed) -> bool:
    return not text[one.start : one.stop].strip()


def _speaks(role: str, messages: Sequence[Any]) -> bool:
    """Tell whether a message of this role has any content."""
    return any(message.get("role") == role and message.get("content") for message in messages)
