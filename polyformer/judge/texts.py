"""A language model judged on texts that it has not seen."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from polyformer.data.rows import RowRecipe, TextRows, encode_texts
from polyformer.errors import DataError
from polyformer.generate.continuing import continue_texts
from polyformer.generate.sampling import Sampling
from polyformer.generate.search import evaluating
from polyformer.judge.held_out import HeldOut, held_out_loss
from polyformer.parts.model import TransformerPart
from polyformer.spec import Record

if TYPE_CHECKING:
    from polyformer.data.checkpoint_tokenizer import TextTokenizer
    from polyformer.data.documents import Document
    from polyformer.data.masking import TextObjective


class Samples(Record):
    """How many samples are shown, of continuations after so many tokens, and how they are drawn."""

    count: int = 0
    prompt: int = 32
    sampling: Sampling = Sampling()


@dataclass(frozen=True)
class Sample:
    """What a model made of a text that it has not seen.

    Attributes:
        given: the beginning of a document, or a piece with masks in it.
        answer: what the model wrote behind it, or the piece with its guesses.
        reference: what stands there.
    """

    given: str
    answer: str
    reference: str


@dataclass(frozen=True)
class TextEvaluation:
    """A language model's scores.

    Attributes:
        documents: how many texts they are of.
        held_out: loss and perplexity of the tokens that were asked for.
        bytes: of the texts, in UTF-8, where every token was asked for; None where only masked ones were.
        seconds: what reading them took.
    """

    documents: int
    held_out: HeldOut
    bytes: int | None
    seconds: float
    samples: Sequence[Sample] = field(default=(), repr=False)

    @property
    def bits_per_byte(self) -> float | None:
        """What a byte of the texts costs; unlike a loss by tokens, it can be compared between vocabularies."""
        return None if self.bytes is None else self.held_out.nats / math.log(2) / self.bytes

    def to_data(self) -> dict[str, Any]:
        """Return what goes into JSON."""
        data: dict[str, Any] = {"documents": self.documents, "held_out": self.held_out.to_data()}
        if self.bytes is not None:
            data |= {"bytes": self.bytes, "bits_per_byte": self.bits_per_byte}
        return data | {"samples": [vars(one) for one in self.samples], "seconds": round(self.seconds, 3)}


def evaluate_texts(
    model: TransformerPart,
    tokenizer: TextTokenizer,
    documents: Sequence[Document],
    rows: RowRecipe,
    objective: TextObjective,
    samples: Samples | None = None,
) -> TextEvaluation:
    """Measure how well a model predicts the tokens of documents, in rows of `rows.length`, and show what it writes.

    Raises:
        DataError: no documents, or a tokenizer that lacks the mask that the objective needs.
    """
    if not documents:
        raise DataError("there are no texts to evaluate on")
    data = encode_texts(tokenizer, documents)
    reader = TextRows(data, rows, objective)
    started = time.perf_counter()
    found = held_out_loss(model, reader.in_order())
    seconds = time.perf_counter() - started
    asked = samples or Samples()
    if objective.reads == "forwards":
        shown = list(continued(model, tokenizer, documents, asked)) if asked.count else []
        return TextEvaluation(len(documents), found, data.bytes, seconds, shown)
    shown = list(_filled(model, tokenizer, reader, asked)) if asked.count else []
    return TextEvaluation(len(documents), found, None, seconds, shown)


def continued(
    model: TransformerPart, tokenizer: TextTokenizer, documents: Sequence[Document], asked: Samples
) -> Iterator[Sample]:
    """Continue the beginnings of some documents, evenly spread; of few documents, of later places too."""
    ends = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
    limit = asked.sampling.limit
    chosen = []
    for number in range(asked.count):
        text = documents[number * len(documents) // asked.count].text
        start = len(text) * number // asked.count if len(documents) < asked.count else 0
        start = text.rfind("\n", 0, start) + 1  # the beginning of a line
        chosen.append(tokenizer.encode(text[start : start + 16 * (asked.prompt + limit)])[: asked.prompt + limit])
    chosen = [ids for ids in chosen if ids]
    if not chosen:
        return
    prompts = [ids[: asked.prompt] for ids in chosen]
    found = continue_texts(model, prompts, asked.sampling, ends)
    for ids, prompt, one in zip(chosen, prompts, found, strict=True):
        yield Sample(tokenizer.decode(prompt), tokenizer.decode(one.ids), tokenizer.decode(ids[len(prompt) :]))


def _filled(model: TransformerPart, tokenizer: TextTokenizer, reader: TextRows, asked: Samples) -> Iterator[Sample]:
    """Fill the masks of the first rows with the likeliest tokens."""
    assert model.head is not None
    batch = next(reader.in_order())
    with evaluating(model):
        guesses = model.head(batch.hidden(model), None).argmax(-1).cpu()
    for ids, labels, guess in zip(batch.input_ids, batch.labels, guesses, strict=True):
        if asked.count <= 0:
            return
        asked = asked.replace(count=asked.count - 1)
        some = slice(0, 4 * asked.prompt)
        masked = labels >= 0
        rows = (ids, torch.where(masked, guess, ids), torch.where(masked, labels, ids))
        control = {tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id}
        shown = ([one for one in row[some].tolist() if one not in control] for row in rows)
        yield Sample(*(tokenizer.decode(row, keep_control=True) for row in shown))
