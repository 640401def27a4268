"""A recipe: everything a run depends on, as one record read from a TOML file."""

from __future__ import annotations

from typing import Literal

from polyformer.data import BatchRecipe, DataRecipe, RowRecipe, TextDataRecipe, TextTokenizerRecipe, TokenizerRecipe
from polyformer.data.masking import NextToken, TextObjective
from polyformer.exports import import_all
from polyformer.families.language_model import LanguageModel
from polyformer.families.transformer import Transformer2017
from polyformer.generate import Sampling, Search
from polyformer.spec import Record
from polyformer.train.averages import Average
from polyformer.train.optimisers import AdamW
from polyformer.train.schedules import Budget, Cosine, Minutes, Schedule

import_all("polyformer.data")  # and with it all kinds of corpora, which recipes call by their names
import_all("polyformer.generate")


class TrainRecipe(Record):
    """How a model is trained.

    `evaluations` are spread evenly over the budget. `patience` is the number of evaluations without a better
    validation loss after which training stops and goes back to the best weights (0: never). `clip` limits the norm
    of the gradient (0: no limit). `precision` "auto" measures which is faster on this machine, `device` "auto" takes a
    GPU where there is one; the resolved recipe in the run folder says what they were. `recompute` "blocks" keeps of
    each block its input alone, and makes the rest again for the gradients: a third more time, far less memory.
    """

    budget: Budget = Minutes(4.0)
    schedule: Schedule = Cosine(peak=1e-3, warmup=200)
    optimiser: AdamW = AdamW()
    smoothing: float = 0.1
    clip: float = 1.0
    accumulate: int = 1
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    recompute: Literal["nothing", "blocks"] = "nothing"
    average: Average | None = None
    evaluations: int = 10
    patience: int = 0
    seed: int = 0
    not_finite: Literal["stop", "skip"] = "stop"
    log_every: int = 10
    checkpoint_minutes: float = 1.0
    tensorboard: bool = False

    def check(self) -> None:
        self.require(0 <= self.smoothing < 1, "smoothing must be in [0, 1)")
        self.require(self.clip >= 0, "clip can't be negative; 0 means no limit")
        self.require(self.accumulate >= 1, "accumulate must be at least 1")
        self.require(self.evaluations >= 1, "evaluations must be at least 1")
        self.require(self.log_every >= 1, "log_every must be at least 1")
        self.require(self.patience >= 0, "patience can't be negative; 0 means never to stop early")


class ReportRecipe(Record):
    """What is judged when training ends: BLEU and chrF on at most `pairs` held-out pairs, and some samples."""

    pairs: int = 500
    samples: int = 10
    search: Search = Search()


class TextReportRecipe(Record):
    """What is judged: the loss of the test texts when training ends, and some samples.

    Of a model that reads forwards, they are continuations of the first `prompt` tokens of test texts; of one that
    fills masks, the guesses at those of a few rows. While it trains, a model is watched by the first `watched` tokens
    of the validation texts.
    """

    samples: int = 3
    watched: int = 32768
    prompt: int = 32
    sampling: Sampling = Sampling(temperature=0.8, top_k=50, limit=100)

    def check(self) -> None:
        self.require(self.samples >= 0, "samples can't be negative")
        self.require(self.prompt >= 1, "prompt must be at least 1")
        self.require(self.watched >= 2, "watched must be at least 2")


class Job(Record, abstract=True):
    """A recipe of some kind: everything that a run depends on. What is done with it is said in `train/jobs.py`."""

    name: str

    @property
    def train(self) -> TrainRecipe:
        """How the model is trained."""
        raise NotImplementedError


class Recipe(Job):
    """From sentence pairs to a translation model."""

    data: DataRecipe
    tokenizer: TokenizerRecipe = TokenizerRecipe()
    model: Transformer2017 = Transformer2017()
    batch: BatchRecipe = BatchRecipe()
    train: TrainRecipe = TrainRecipe()
    report: ReportRecipe = ReportRecipe()

    def check(self) -> None:
        length, longest = self.model.positions.length, self.batch.longest
        self.require(
            length is None or length >= longest,
            f"batch.longest allows sequences of {longest} tokens, but the model has {length} positions; "
            "lower the one or raise model.positions.length",
        )


class TextRecipe(Job):
    """From texts to a language model: one that writes on (`NextToken`), or one that fills masks (`MaskedTokens`)."""

    data: TextDataRecipe
    objective: TextObjective = NextToken()
    tokenizer: TextTokenizerRecipe = TextTokenizerRecipe()
    model: LanguageModel = LanguageModel()
    batch: RowRecipe = RowRecipe()
    train: TrainRecipe = TrainRecipe(smoothing=0.0)
    report: TextReportRecipe = TextReportRecipe()

    def check(self) -> None:
        length, reads = self.model.length, self.model.reads
        self.require(
            length is None or length >= self.batch.length,
            f"batch.length makes rows of {self.batch.length} tokens, but the model has {length}; lower the one or "
            "raise model.length",
        )
        self.require(
            reads is None or reads == self.objective.reads,
            f"{type(self.objective).__name__} needs a model that reads {self.objective.reads}, not one that "
            f"reads {reads}; leave model.reads out",
        )
        self.sized(self.model.vocabulary or 2).spec()  # which says what can't be, before any data are read

    def sized(self, vocabulary: int | None) -> LanguageModel:
        """Return the model with what the rest of the recipe says of it; its own words come first."""
        model = self.model
        length = self.batch.length if model.length is None else model.length
        return model.replace(vocabulary=vocabulary, length=length, reads=self.objective.reads)
