"""What encoders learn: labels of texts, words and images, and which texts belong together."""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from polyformer.data.batches import Column
from polyformer.data.examples import Example, ExampleSplits, Kind
from polyformer.data.labelled import (
    Fitted,
    ItemRows,
    PictureRows,
    RelatedRows,
    fit,
    tag_labels,
)
from polyformer.data.reader import Reader
from polyformer.errors import DataError, SpecError
from polyformer.generate.search import evaluating
from polyformer.judge import Sample
from polyformer.loaded import Loaded
from polyformer.loaded.heads import Answers, has_head, with_head
from polyformer.parts import Chain, Mean, Normalise, TokenEmbedding
from polyformer.parts.model import TransformerPart
from polyformer.parts.part import Part
from polyformer.spec import walk
from polyformer.train.aims import LABELS, contrastive, label_scores, vectors
from polyformer.train.lessons import Lesson, spread
from polyformer.train.objectives import LIKELIHOOD, Aim
from polyformer.train.tuning import TuneRecipe

MODULES = "sentence_transformers.models"


class Labelling(Lesson):
    """A head that gives scores to labels: the model's own where it has these labels, or a new one."""

    @property
    def labels(self) -> tuple[str, ...]:
        """The labels, in the order of the head's scores."""
        found: tuple[str, ...] = self.task.labels
        return found

    @property
    def answers(self) -> bool:
        assert self.answer is not None
        return has_head(self.base, self.answer, self.labels)

    @abstractmethod
    def named(self, example: Example) -> Iterable[str]:
        """Return the labels that stand in an example."""

    def settled(self, splits: ExampleSplits) -> TuneRecipe:
        found = {name for one in splits.train for name in self.named(one)}
        labels = self.task.labels
        if not labels:  # those of the model, if it knows all; else in the order of the alphabet
            labels = self.base.labels if found <= set(self.base.labels) else tuple(sorted(found))
        if len(labels) < 2:
            raise DataError(f"{self.recipe.data.path} has the one label '{labels[0]}'; there is nothing to tell apart")
        self.recipe = self.recipe.replace(task=self.task.replace(labels=labels))
        for one in (*splits.train, *splits.validation):
            self.numbers(one)
        return self.recipe

    def numbers(self, example: Example) -> list[int]:
        """Return an example's labels by their places; raises `DataError` for one that isn't to be learnt."""
        places = {name: i for i, name in enumerate(self.labels)}
        named = list(self.named(example))
        strange = next((name for name in named if name not in places), None)
        if strange is not None:
            raise DataError(f"{example.where} has the label '{strange}', which no example to train on has")
        return [places[name] for name in named]

    def headed(self, loaded: Loaded) -> Loaded:
        assert self.answer is not None
        made, self.new = with_head(loaded, self.answer, self.labels)
        return made

    @property
    def notes(self) -> list[str]:
        told = [f"labels: {', '.join(self.labels[:12])}{', …' if len(self.labels) > 12 else ''}"]
        return told + ([f"new in the head, drawn at random: {', '.join(self.new)}"] if self.new else [])

    def compared(self, reader: Reader[Any]) -> Iterator[dict[str, Any]]:
        yield next(reader.in_order()).inputs


class Classifying(Labelling):
    """One label to each text."""

    kinds: ClassVar[tuple[Kind, ...]] = ("labelled",)
    what = "texts"
    item = "a text"
    names = ("text", "label given", "label that stands there")
    aim: Aim = LABELS
    answer: ClassVar[Answers | None] = "sequence"

    def named(self, example: Example) -> Iterable[str]:
        return (str(example.data["label"]),)

    def settled(self, splits: ExampleSplits) -> TuneRecipe:
        super().settled(splits)
        return self.with_rows(self.length())

    def reader(self, examples: Sequence[Example]) -> tuple[Reader[Any], list[str]]:
        batch = self.recipe.batch
        assert batch.length is not None
        texts = fit(self.base.texts, [one.data["text"] for one in examples], batch.length)
        rows = ItemRows(texts, [self.numbers(one)[0] for one in examples], batch.tokens, batch.seed)
        return rows, [f"{len(examples):,} texts with {int(texts.ids.lengths.sum()):,} tokens", *texts.notes]

    def figures(self, model: TransformerPart, reader: Reader[Any]) -> dict[str, float]:
        return label_figures(model, reader, len(self.labels))

    def samples(self, model: TransformerPart, examples: Sequence[Example]) -> list[Sample]:
        some = spread(examples, self.recipe.report.samples)
        if not some:
            return []
        reader, _ = self.reader(some)
        given = guesses(model, reader)
        return [Sample(self.shown(one), self.labels[given[i]], *self.named(one)) for i, one in enumerate(some)]

    def shown(self, example: Example) -> str:
        """Return what is shown of an example."""
        text: str = example.data["text"]
        return text if len(text) <= 600 else f"{text[:600]}…"

    @property
    def commands(self) -> tuple[str, ...]:
        return ('classify {run} "A text"',)


class Seeing(Classifying):
    """One label to each image."""

    kinds = ("pictured",)
    what = "images"
    item = "an image"
    names = ("image", "label given", "label that stands there")
    answer = "image"

    def settled(self, splits: ExampleSplits) -> TuneRecipe:
        if not self.base.reads_images:
            raise SpecError(f"{self.recipe.base} reads no images")
        return Labelling.settled(self, splits)

    def reader(self, examples: Sequence[Example]) -> tuple[Reader[Any], list[str]]:
        files = [one.data["image"] for one in examples]
        missing = next((one for one in examples if not Path(one.data["image"]).is_file()), None)
        if missing is not None:
            raise DataError(f"{missing.where}: there is no file {missing.data['image']}")
        sizes = (self.task.together, self.recipe.batch.seed)
        numbers = [self.numbers(one)[0] for one in examples]
        return PictureRows(self.base.images, files, numbers, sizes), [f"{len(files):,} images"]

    def shown(self, example: Example) -> str:
        return str(example.data["image"])

    @property
    def commands(self) -> tuple[str, ...]:
        return ("classify {run} FILE.png",)


class Tagging(Labelling):
    """One label to each word, by its first token."""

    kinds = ("tagged",)
    what = "words"
    item = "a word"
    names = ("words", "tags given", "tags that stand there")
    aim: Aim = LIKELIHOOD
    answer = "token"

    def named(self, example: Example) -> Iterable[str]:
        return map(str, example.data["tags"])

    def settled(self, splits: ExampleSplits) -> TuneRecipe:
        super().settled(splits)
        return self.with_rows(self.length())

    def reader(self, examples: Sequence[Example]) -> tuple[Reader[Any], list[str]]:
        batch = self.recipe.batch
        assert batch.length is not None
        texts = self.base.texts
        rows = [tag_labels(texts, one.data["tokens"], self.numbers(one), batch.length) for one in examples]
        asked = sum(label >= 0 for _, labels in rows for label in labels)
        words = sum(len(one.data["tokens"]) for one in examples)
        told = [f"{len(examples):,} texts with {words:,} words"]
        if asked < words:
            told.append(f"cut away, or without a token: {words - asked:,} words")
        if not asked:
            raise DataError("no word of the examples has a token that could be tagged")
        fitted = Fitted(Column([ids for ids, _ in rows]), 0, texts.pad_id or 0)
        return ItemRows(fitted, [labels for _, labels in rows], batch.tokens, batch.seed), told

    def figures(self, model: TransformerPart, reader: Reader[Any]) -> dict[str, float]:
        right = asked = 0
        found, wanted = list[list[str]](), list[list[str]]()
        for given, labels in self._tagged(model, reader):
            right += sum(one == own for one, own in zip(given, labels, strict=True))
            asked += len(labels)
            found.append([self.labels[one] for one in given])
            wanted.append([self.labels[one] for one in labels])
        figures = {"accuracy": right / max(asked, 1)}
        if any(name.startswith("B-") for name in self.labels):
            figures["span F1"] = span_f1(found, wanted)
        return figures

    def samples(self, model: TransformerPart, examples: Sequence[Example]) -> list[Sample]:
        some = spread(examples, self.recipe.report.samples)
        shown = []
        for one in some:
            ((given, labels),) = self._tagged(model, self.reader([one])[0])
            told = (" ".join(self.labels[i] for i in row) for row in (given, labels))
            shown.append(Sample(" ".join(one.data["tokens"]), *told))
        return shown

    def _tagged(self, model: TransformerPart, reader: Reader[Any]) -> Iterator[tuple[list[int], list[int]]]:
        """Yield each text's tags, those given and those that stand there."""
        head = model.head
        assert head is not None
        with evaluating(model):
            for batch in reader.in_order():
                best = head(batch.hidden(model), None).argmax(-1).cpu()
                for row, labels in zip(best, batch.labels, strict=True):
                    yield row[labels >= 0].tolist(), labels[labels >= 0].tolist()


class Relating(Lesson):
    """Texts that belong together are to be near each other, and all others of the batch farther off."""

    kinds = ("related",)
    what = "texts"
    item = "a text"

    def __init__(self, recipe: TuneRecipe, base: Loaded) -> None:
        super().__init__(recipe, base)
        self.aim = contrastive(self.pooling, self.task.temperature)

    @property
    def pooling(self) -> Part:
        """What makes a vector of rows: the model's own, or the normalised mean; it is not trained."""
        return Chain((Mean(), Normalise())).build() if self.base.pooling is None else self.base.pooling.part

    def settled(self, splits: ExampleSplits) -> TuneRecipe:
        model = self.base.model
        if (model.encoder is not None and model.decoder is not None) or self.base.reads_images:
            raise SpecError(f"{self.recipe.base} has no vectors of texts: that needs an encoder or a decoder alone")
        return self.with_rows(self.length())

    def length(self) -> int:
        own = None if self.base.pooling is None else self.base.pooling.length
        most = super().length()
        return most if own is None or self.recipe.batch.length is not None else min(own, most)

    def headed(self, loaded: Loaded) -> Loaded:
        if loaded.pooling is None and loaded.family is not None:
            width = next(one.width for _, one in walk(loaded.spec) if isinstance(one, TokenEmbedding))
            loaded.files |= mean_pooling(width)
        return loaded

    def reader(self, examples: Sequence[Example]) -> tuple[Reader[Any], list[str]]:
        batch = self.recipe.batch
        assert batch.length is not None
        if len(examples) < 2:
            raise DataError("one pair of texts has no others to be told from; give more, or hold out more")
        rows = RelatedRows(self.base.texts, examples, batch.length, (self.task.together, batch.seed))
        return rows, [f"{len(examples):,} pairs", *rows.anchors.notes, *rows.others.notes]

    def figures(self, model: TransformerPart, reader: Reader[Any]) -> dict[str, float]:
        """Return how many anchors are nearest to their own text among all held-out ones."""
        assert isinstance(reader, RelatedRows)
        anchors, others, same = list[Tensor](), list[Tensor](), list[Tensor]()
        with evaluating(model):
            for batch in reader.in_order():
                anchors.append(vectors(model, self.pooling, *batch.anchors).cpu())
                others.append(vectors(model, self.pooling, *batch.others)[: len(anchors[-1])].cpu())
                same.append(batch.same[: len(anchors[-1])])
        numbers = torch.cat(same)
        nearest = (torch.cat(anchors) @ torch.cat(others).T).argmax(-1)
        return {"nearest is its own": float((numbers[nearest] == numbers).double().mean())}

    @property
    def commands(self) -> tuple[str, ...]:
        return ('embed {run} "A text"',)


def guesses(model: TransformerPart, reader: Reader[Any]) -> dict[int, int]:
    """Return the likeliest label of each item, by its number."""
    found: dict[int, int] = {}
    with evaluating(model):
        for batch in reader.in_order():
            best = label_scores(model, batch).argmax(-1).tolist()
            found |= dict(zip(batch.rows.tolist(), best, strict=True))
    return found


def label_figures(model: TransformerPart, reader: Reader[Any], labels: int) -> dict[str, float]:
    """Return accuracy, and the mean of the labels' F1 (that of one which neither stands there nor is given is 0)."""
    table = torch.zeros(labels, labels, dtype=torch.long)
    with evaluating(model):
        for batch in reader.in_order():
            best = label_scores(model, batch).argmax(-1).cpu()
            table.index_put_((batch.labels, best), torch.ones_like(best), accumulate=True)
    right = table.diagonal().double()
    f1 = 2 * right / (table.sum(0) + table.sum(1)).clamp(min=1)
    return {"accuracy": float(right.sum() / table.sum()), "macro F1": float(f1.mean())}


def span_f1(found: Sequence[Sequence[str]], wanted: Sequence[Sequence[str]]) -> float:
    """Return the F1 of whole spans, which begin with B-X and go on with I-X (Tjong Kim Sang and De Meulder 2003)."""
    ours, theirs = ({(i, *span) for i, tags in enumerate(rows) for span in spans_of(tags)} for rows in (found, wanted))
    return 2 * len(ours & theirs) / max(len(ours) + len(theirs), 1)


def spans_of(tags: Sequence[str]) -> list[tuple[int, int, str]]:
    """Return (start, stop, kind) of each span; an I-X that goes on from nothing begins one."""
    found, start, kind = list[tuple[int, int, str]](), 0, ""
    for i, tag in enumerate([*tags, "O"]):
        mark, _, own = tag.partition("-")
        if kind and (mark != "I" or own != kind):
            found.append((start, i, kind))
            kind = ""
        if mark in ("B", "I") and not kind:
            start, kind = i, own
    return found


def mean_pooling(width: int) -> dict[str, bytes]:
    """Return the files by which a folder says that a text's vector is the normalised mean of its rows."""
    steps = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")]
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"{MODULES}.{kind}"} for i, (path, kind) in enumerate(steps)
    ]
    pooling = {"word_embedding_dimension": width, "pooling_mode_mean_tokens": True}
    files = {"modules.json": modules, "1_Pooling/config.json": pooling, "2_Normalize/.keep": None}
    return {name: b"" if one is None else (json.dumps(one, indent=1) + "\n").encode() for name, one in files.items()}
