"""What is done with each kind of recipe: prepare its data, open them, judge the model, tell of it.

All else, the loop, checkpoints, run folders and resuming, is the same for every kind.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Generic, Protocol, TypeVar

import torch

from polyformer.data import (
    Batches,
    Document,
    PairTokenizer,
    Reader,
    TextRows,
    encode_pairs,
    encode_texts,
    learn_text_tokenizer,
    prepare,
    prepare_texts,
    read_pairs,
    write_pairs,
)
from polyformer.data.checkpoint_tokenizer import TextTokenizer
from polyformer.data.documents import TextSplits, read_documents, write_documents
from polyformer.errors import DataError
from polyformer.judge import Samples, evaluate, evaluate_texts
from polyformer.parts.model import Transformer, TransformerPart
from polyformer.train.objectives import LIKELIHOOD, Aim
from polyformer.train.recipe import Job, Recipe, TextRecipe
from polyformer.train.report import pair_sections, text_sections
from polyformer.weights.assemble import disassemble
from polyformer.weights.files import write_tensors

SPLITS = ("train", "validation", "test")
TOKENIZER, REPORT = "tokenizer", "report.txt"

J = TypeVar("J", bound=Job)


class Verdict(Protocol):
    """The scores of a model."""

    def to_data(self) -> dict[str, Any]:
        """Return what goes into `scores.json`."""


@dataclass
class Opened:
    """What a run reads: the batches that it trains on, those that it is watched by, and how it is judged in the end."""

    train: Reader[Any]
    validation: Reader[Any]
    judge: Callable[[TransformerPart], Verdict]
    aim: Aim = LIKELIHOOD
    after_epoch: Callable[[TransformerPart, int], None] | None = None


class Work(ABC, Generic[J]):
    """What is done with one kind of recipe."""

    def __init__(self, recipe: J) -> None:
        self.recipe = recipe

    @property
    @abstractmethod
    def what(self) -> str:
        """What its loss is counted by."""

    @abstractmethod
    def prepare(self, folder: Path) -> J:
        """Write splits and tokenizer into the new run folder; return the recipe with all sizes known.

        Raises:
            DataError, SpecError: data or sizes that can't be used.
        """

    @abstractmethod
    def like(self, own: J) -> J:
        """Return the recipe with the sizes that `prepare` found out when it made the run of `own`."""

    @abstractmethod
    def spec(self) -> Transformer:
        """Return the model; its sizes must be known."""

    def begin(self, folder: Path) -> None:
        """Write what the new run folder says of the model; its sizes must be known."""
        (folder / "spec.json").write_text(self.spec().to_json(), encoding="utf-8")

    def model(self) -> TransformerPart:
        """Return the model as training begins with it; what is drawn for it comes from PyTorch's generator."""
        model = self.spec().build()
        assert isinstance(model, TransformerPart)
        return model

    def keep(self, model: TransformerPart, folder: Path) -> None:
        """Write the trained model into the run folder."""
        write_tensors(folder / "model.safetensors", disassemble(model))

    @property
    @abstractmethod
    def about(self) -> str:
        """What a report says of the model beside its size."""

    @abstractmethod
    def open(self, folder: Path) -> Opened:
        """Read what `prepare` wrote."""

    @abstractmethod
    def told(self, verdict: Any) -> list[str]:
        """Return the sections of a report that are about this verdict."""

    @property
    @abstractmethod
    def commands(self) -> tuple[str, ...]:
        """What can be asked of the model from the command line, with `{run}` for its folder."""


class OfPairs(Work[Recipe]):
    """From sentence pairs to a translation model."""

    what: ClassVar[str] = "target tokens"

    def prepare(self, folder: Path) -> Recipe:
        splits = prepare(self.recipe.data)
        tokenizer = PairTokenizer.train(splits.train, self.recipe.tokenizer)
        tokenizer.save(folder / TOKENIZER)
        (folder / "splits").mkdir()
        for name in SPLITS:
            write_pairs(folder / "splits" / f"{name}.jsonl", getattr(splits, name))
        (folder / "splits" / REPORT).write_text(f"{splits.report}\n", encoding="utf-8")
        sizes = {"source_vocabulary": tokenizer.source_vocabulary, "target_vocabulary": tokenizer.target_vocabulary}
        return self.recipe.replace(model=self.recipe.model.replace(**sizes))

    def like(self, own: Recipe) -> Recipe:
        sizes = {"source_vocabulary": own.model.source_vocabulary, "target_vocabulary": own.model.target_vocabulary}
        return self.recipe.replace(model=self.recipe.model.replace(**sizes))

    def spec(self) -> Transformer:
        return self.recipe.model.spec()

    @property
    def about(self) -> str:
        return f"vocabulary {self.recipe.tokenizer.vocabulary:,} ({self.recipe.tokenizer.kind})"

    def open(self, folder: Path) -> Opened:
        batch, report = self.recipe.batch, self.recipe.report
        tokenizer = PairTokenizer.load(folder / TOKENIZER)
        train, validation, test = (read_pairs(folder / "splits" / f"{name}.jsonl") for name in SPLITS)
        return Opened(
            Batches(encode_pairs(tokenizer, train, batch), batch),
            Batches(encode_pairs(tokenizer, validation, batch.replace(too_long="drop")), batch),
            lambda model: evaluate(model, tokenizer, test[: report.pairs], report.search),
        )

    def told(self, verdict: Any) -> list[str]:
        return pair_sections(self.recipe, verdict)

    @property
    def commands(self) -> tuple[str, ...]:
        text = '"Save the file"'
        return f"translate {{run}} {text}", f"explain {{run}} {text} --out attention.png", "inspect {run}"


class OfTexts(Work[TextRecipe]):
    """From texts to a language model."""

    what: ClassVar[str] = "tokens asked for"

    def prepare(self, folder: Path) -> TextRecipe:
        splits = prepare_texts(self.recipe.data)
        masks = self.recipe.objective.reads == "both ways"
        tokenizer = learn_text_tokenizer(splits.train, self.recipe.tokenizer, masks)
        self._refuse_short(splits, tokenizer)
        recipe = self.recipe.replace(model=self.recipe.sized(tokenizer.vocabulary))
        _try(recipe)
        tokenizer.save(folder / TOKENIZER)
        (folder / "splits").mkdir()
        for name in SPLITS:
            write_documents(folder / "splits" / f"{name}.jsonl", getattr(splits, name))
        (folder / "splits" / REPORT).write_text(f"{splits}\n", encoding="utf-8")
        return recipe

    def _refuse_short(self, splits: TextSplits, tokenizer: TextTokenizer) -> None:
        """Raise for training texts that don't fill a row; long ones are not even looked at."""
        length = self.recipe.batch.length
        if sum(len(one.text) for one in splits.train) > 64 * length:
            return
        found = len(encode_texts(tokenizer, splits.train))
        if found <= length:
            raise DataError(
                f"the training texts have {found:,} tokens, too few for a row of {length} and one more; "
                "lower batch.length, or give more text"
            )

    def like(self, own: TextRecipe) -> TextRecipe:
        return self.recipe.replace(model=self.recipe.sized(own.model.vocabulary))

    def spec(self) -> Transformer:
        return self.recipe.model.spec()

    @property
    def about(self) -> str:
        return f"vocabulary {self.recipe.tokenizer.vocabulary:,} ({self.recipe.tokenizer.kind})"

    def open(self, folder: Path) -> Opened:
        tokenizer = TextTokenizer.load(folder / TOKENIZER)
        documents: dict[str, list[Document]] = {
            name: read_documents(folder / "splits" / f"{name}.jsonl") for name in SPLITS
        }
        rows, objective, report = self.recipe.batch, self.recipe.objective, self.recipe.report
        asked = Samples(report.samples, report.prompt, report.sampling)
        validation = encode_texts(tokenizer, documents["validation"]).first(report.watched)
        return Opened(
            TextRows(encode_texts(tokenizer, documents["train"]), rows, objective),
            TextRows(validation, rows, objective),
            lambda model: evaluate_texts(model, tokenizer, documents["test"], rows, objective, asked),
        )

    def told(self, verdict: Any) -> list[str]:
        return text_sections(self.recipe, verdict)

    @property
    def commands(self) -> tuple[str, ...]:
        masks = self.recipe.objective.reads == "both ways"
        asked = 'fill {run} "To be, or <mask> to be"' if masks else 'generate {run} "To be, or" --temperature 0.8'
        return asked, "evaluate {run}", "inspect {run}"


def _try(recipe: TextRecipe) -> None:
    """Run one block of the model over one row, so that what its parts refuse shows before anything is written."""
    model = recipe.model.replace(depth=1).spec().build()
    assert isinstance(model, TransformerPart)
    ids = torch.zeros(1, recipe.batch.length, dtype=torch.long)
    apart = torch.arange(recipe.batch.length)[None] // 2 if recipe.batch.documents == "apart" else None
    with torch.no_grad():
        model(input_ids=ids, document_ids=apart)
