"""What is done with each kind of examples that a model is tuned on: encode them, measure, show.

All else, the base, the method, splits and files, is the same for every kind; see `polyformer.train.tuned`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from polyformer.data import Document, NextToken, Reader, RowRecipe, TextRows, encode_texts
from polyformer.data.examples import Example, ExampleSplits, Kind
from polyformer.data.masking import MaskedTokens, TextObjective
from polyformer.data.turns import EncodedTurns, Packing, Renderer, TurnRows, encode_turns
from polyformer.errors import DataError, SpecError
from polyformer.generate.continuing import continue_texts
from polyformer.generate.search import positions_of
from polyformer.judge import HeldOut, Sample, Samples
from polyformer.judge.texts import continued
from polyformer.loaded import Loaded
from polyformer.loaded.heads import Answers
from polyformer.loaded.writing import context_of
from polyformer.parts.contract import contract_of
from polyformer.parts.heads import LMHeadPart
from polyformer.parts.model import Transformer, TransformerPart
from polyformer.swap import Drift
from polyformer.train.objectives import LIKELIHOOD, Aim
from polyformer.train.tuning import TuneRecipe

LONGEST_ROW = 1024


@dataclass(frozen=True)
class TuneScores:
    """How a tuned model does on the held-out examples.

    Attributes:
        held_out, before: its loss, and that of the base; None where the base has no answer to them.
        figures: other measures by name, such as "accuracy".
        figures_before: the base's, where it has an answer.
        drift: how far its answers are from the base's; None where they can't be compared.
        samples: some of its answers.
    """

    held_out: HeldOut
    before: HeldOut | None = None
    figures: dict[str, float] = field(default_factory=dict)
    figures_before: dict[str, float] = field(default_factory=dict)
    drift: Drift | None = None
    samples: Sequence[Sample] = ()

    def to_data(self) -> dict[str, Any]:
        """Return what goes into `scores.json`."""
        told: dict[str, Any] = {"held_out": self.held_out.to_data(), **self.figures}
        if self.before is not None:
            told["before"] = {"held_out": self.before.to_data(), **self.figures_before}
        if self.drift is not None:
            told["drift"] = self.drift.to_data()
        return told | ({"samples": [vars(one) for one in self.samples]} if self.samples else {})


class Lesson(ABC):
    """A kind of examples, and a model that learns from them.

    Attributes:
        kinds: of examples that it takes.
        what: what its loss is counted by.
        item: one of these.
        names: what its samples show, in order.
        aim: what is minimised.
        answer: what labels are of, where it learns such; None for words.
        new: the parameters of a head that is new.
        packings: how its examples can be put into rows, the first that the model's parts allow; none if it has no say.
        before: ids that stand before every text, where a prompt is trained.
    """

    kinds: ClassVar[tuple[Kind, ...]]
    what: ClassVar[str] = "tokens asked for"
    item: ClassVar[str] = "a token"
    names: ClassVar[tuple[str, str, str]] = ("given", "written", "as it stands there")
    aim: Aim = LIKELIHOOD
    answer: ClassVar[Answers | None] = None
    new: tuple[str, ...] = ()
    packings: ClassVar[tuple[Packing, ...]] = ()
    before: tuple[int, ...] = ()

    def __init__(self, recipe: TuneRecipe, base: Loaded) -> None:
        self.recipe, self.base = recipe, base

    @property
    def task(self) -> Any:
        """What is learnt, of the lesson's own type."""
        return self.recipe.task

    @abstractmethod
    def settled(self, splits: ExampleSplits) -> TuneRecipe:
        """Return the recipe with what the examples and the model decide.

        Raises:
            DataError, SpecError: examples or a model that it can't do.
        """

    @abstractmethod
    def reader(self, examples: Sequence[Example]) -> tuple[Reader[Any], list[str]]:
        """Return batches of examples, and what a person should know of how they fit."""

    def headed(self, loaded: Loaded) -> Loaded:
        """Return the model with the head that it needs; what is new of it is drawn at random."""
        return loaded

    @property
    def answers(self) -> bool:
        """Whether the base has an answer to the examples already, with which the tuned one can be compared."""
        return True

    def compared(self, reader: Reader[Any]) -> Iterator[dict[str, Any]]:
        """Yield inputs on which the tuned model and the base are compared; none where they can't be."""
        yield from ()

    def figures(self, model: TransformerPart, reader: Reader[Any]) -> dict[str, float]:
        """Return further measures of a model."""
        return {}

    def samples(self, model: TransformerPart, examples: Sequence[Example]) -> list[Sample]:
        """Return some answers of the model to held-out examples."""
        return []

    @property
    def notes(self) -> list[str]:
        """What a person should know of how the model was made ready."""
        return []

    @property
    def commands(self) -> tuple[str, ...]:
        """What can be asked of the result, with `{run}` for its folder."""
        return ()

    def length(self) -> int:
        """Return the tokens of a row: what was asked for, or what the model was made for, up to some bound.

        Raises:
            SpecError: the model can't read as many as were asked for.
        """
        side = self.base.spec.source or self.base.spec.target
        most = positions_of(side) or context_of(self.base)
        asked = self.recipe.batch.length
        if asked is not None and most is not None and asked > most:
            raise SpecError(f"batch.length is {asked}, but {self.recipe.base} reads at most {most} tokens")
        return asked or min(most or LONGEST_ROW, LONGEST_ROW)

    def with_rows(self, length: int) -> TuneRecipe:
        """Return the recipe with rows of this length, in batches that can hold one."""
        batch = self.recipe.batch
        return self.recipe.replace(batch=batch.replace(length=length, tokens=max(batch.tokens, length)))

    def packed(self, spec: Transformer) -> TuneRecipe:
        """Return the recipe with the way in which examples are put into rows, for the model that is to be trained.

        Raises:
            SpecError: a way that was asked for, but that its parts or these examples don't allow.
        """
        asked, clash = self.recipe.batch.packing, contract_of(spec).get("packed")
        if not self.packings:
            return self.recipe
        if asked is None:
            asked = next(one for one in self.packings if one != "apart" or clash is None)
        if asked == "padded" and asked not in self.packings:
            raise SpecError("plain texts fill their rows; batch.packing can be apart or joined")
        if asked == "apart" and clash is not None:
            raise SpecError(
                f"{self.recipe.base} can't keep several examples of a row apart ({clash}); "
                f"leave batch.packing out, or set it to {self.packings[-1]}"
            )
        return self.recipe.replace(batch=self.recipe.batch.replace(packing=asked))


def spread(examples: Sequence[Example], count: int) -> list[Example]:
    """Return some examples, evenly spread."""
    return [examples[i * len(examples) // count] for i in range(min(count, len(examples)))]


class Conversing(Lesson):
    """Messages, or prompts and completions: a decoder's own words are asked for."""

    kinds = ("messages", "completion")
    packings = ("apart", "padded")

    def settled(self, splits: ExampleSplits) -> TuneRecipe:
        if self.base.model.encoder is not None or not isinstance(self.base.model.head, LMHeadPart):
            raise SpecError(f"{self.recipe.base} is no decoder that writes texts, so it can't learn to converse")
        prompts = self.task.prompts or ("plain" if self.base.texts.chat_template is None else "chat")
        return self.with_rows(self.length()).replace(task=self.task.replace(prompts=prompts))

    def reader(self, examples: Sequence[Example]) -> tuple[TurnRows, list[str]]:
        batch = self.recipe.batch
        assert batch.length is not None
        data: EncodedTurns = encode_turns(self._renderer(), examples, batch.length)
        return TurnRows(data, batch, batch.length), data.notes

    def compared(self, reader: Reader[Any]) -> Iterator[dict[str, Any]]:
        batch = next(reader.in_order())
        given = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
        given["document_ids"] = batch.document_ids
        yield {name: tensor for name, tensor in given.items() if tensor is not None}

    def samples(self, model: TransformerPart, examples: Sequence[Example]) -> list[Sample]:
        report = self.recipe.report
        renderer = self._renderer()
        asked = [renderer.prompt(one.data) for one in spread(examples, report.samples)]
        most = (positions_of(self.base.spec.target) or context_of(self.base) or 2**20) - report.sampling.limit
        asked = [one for one in asked if len(one[0]) <= most]
        if not asked:
            return []
        found = continue_texts(model, [one[0] for one in asked], report.sampling, self._ends(renderer))
        decode = self.base.texts.decode
        return [
            Sample(given, decode(answer.ids), reference)
            for (_, given, reference), answer in zip(asked, found, strict=True)
        ]

    @property
    def commands(self) -> tuple[str, ...]:
        talks = self.task.prompts == "chat"
        return ("chat {run}" if talks else 'generate {run} "Once upon a time"',)

    def _renderer(self) -> Renderer:
        return Renderer(self.base.texts, self.task.prompts, self.before)

    def _ends(self, renderer: Renderer) -> tuple[int, ...]:
        own = self.base.texts.eos_id
        return tuple({*self.base.ends(), *(() if own is None else (own,))})


class Reading(Lesson):
    """Plain texts, read on or with masks."""

    kinds = ("text",)
    packings = ("apart", "joined")

    @property
    def objective(self) -> TextObjective:
        """What is asked for."""
        return NextToken() if self.base.model.encoder is None else MaskedTokens()

    @property
    def rows(self) -> RowRecipe:
        """How texts are put into rows."""
        batch = self.recipe.batch
        assert batch.length is not None
        documents = "joined" if batch.packing == "joined" else "apart"
        return RowRecipe.from_data(
            {"length": batch.length, "tokens": batch.tokens, "documents": documents, "seed": batch.seed}
        )

    def settled(self, splits: ExampleSplits) -> TuneRecipe:
        model = self.base.model
        if (model.encoder is not None and model.decoder is not None) or not isinstance(model.head, LMHeadPart):
            raise SpecError(f"{self.recipe.base} has no head over the tokens of one text, so it can't learn from texts")
        return self.with_rows(self.length())

    def reader(self, examples: Sequence[Example]) -> tuple[TextRows, list[str]]:
        data = encode_texts(self.base.texts, _documents(examples))
        if len(data) < 2:
            raise DataError("the texts have no two tokens, from which nothing can be learnt")
        return TextRows(data, self.rows, self.objective), [f"{len(examples):,} texts with {len(data):,} tokens"]

    def compared(self, reader: Reader[Any]) -> Iterator[dict[str, Any]]:
        batch = next(reader.in_order())
        given = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
        yield {name: tensor for name, tensor in given.items() if tensor is not None}

    def samples(self, model: TransformerPart, examples: Sequence[Example]) -> list[Sample]:
        report = self.recipe.report
        if self.objective.reads != "forwards" or not report.samples:
            return []
        asked = Samples(report.samples, report.prompt, report.sampling)
        return list(continued(model, self.base.texts, _documents(examples), asked))

    @property
    def commands(self) -> tuple[str, ...]:
        if self.objective.reads == "forwards":
            return ('generate {run} "Once upon a time"',)
        return ('fill {run} "A sentence with a mask in it"',)


def _documents(examples: Sequence[Example]) -> list[Document]:
    return [Document(one.where, one.data["text"]) for one in examples]
