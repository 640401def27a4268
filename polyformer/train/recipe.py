"""A recipe: everything a run depends on, as one record read from a TOML file."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any, Literal

from polyformer.data import BatchRecipe, DataRecipe, RowRecipe, TextDataRecipe, TextTokenizerRecipe, TokenizerRecipe
from polyformer.data.masking import NextToken, TextObjective
from polyformer.data.vocabulary import Subwords
from polyformer.errors import RunError, SpecError
from polyformer.exports import import_all
from polyformer.families.language_model import LanguageModel
from polyformer.families.transformer import Transformer2017
from polyformer.generate import Sampling, Search
from polyformer.spec import Record, json_schema
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
    GPU where there is one; the resolved recipe in the run folder says what they were.
    """

    budget: Budget = Minutes(4.0)
    schedule: Schedule = Cosine(peak=1e-3, warmup=200)
    optimiser: AdamW = AdamW()
    smoothing: float = 0.1
    clip: float = 1.0
    accumulate: int = 1
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    device: Literal["auto", "cpu", "cuda"] = "auto"
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

    @property
    def tokenizer(self) -> Subwords:
        """Which vocabulary is learnt."""
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


def read_recipe(path: Path, settings: list[str] | None = None) -> Job:
    """Read a recipe and change it by `key=value` settings, such as `train.budget.count=2`.

    Its `type` says which kind it is: `Recipe`, of sentence pairs, where it says nothing, or `TextRecipe`.

    A value is read as TOML (`3`, `true`, `["en-de"]`, `{type = "Steps", count = 100}`); what is none is text. A
    number in a key counts into a list: `data.corpora.0.path=pairs.tsv`.

    Raises:
        SpecError: a misspelt key, a value of the wrong kind, a setting without `=`.
        RunError: the file can't be read.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise RunError(f"the recipe {path} can't be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise SpecError(f"the recipe {path} is not UTF-8 at byte {error.start}") from None
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise SpecError(f"the recipe {path} is not TOML: {error}") from None
    for setting in settings or []:
        apply_setting(data, setting)
    return recipe_of(data, path.name)


def recipe_of(data: dict[str, Any], where: str) -> Job:
    """Read a recipe of whichever kind from plain data; raises `SpecError` as `read_recipe` does."""
    return Job.from_data({"type": Recipe.__name__, **data}, where)


def recipe_schema() -> dict[str, Any]:
    """Return the JSON Schema of all kinds of recipes; one that doesn't say its type is a `Recipe`."""
    made = json_schema(Job)
    return {**{key: value for key, value in made.items() if key != "$ref"}, "anyOf": [_ref(Recipe), _ref(Job)]}


def _ref(cls: type[Record]) -> dict[str, str]:
    return {"$ref": f"#/$defs/{cls.__name__}"}


def apply_setting(data: dict[str, Any], setting: str) -> None:
    """Change `data` in place by one `key=value`."""
    key, equals, text = setting.partition("=")
    if not equals or not key.strip():
        raise SpecError(f"--set wants key=value, such as train.seed=1, not '{setting}'")
    *path, last = key.strip().split(".")
    at: Any = data
    for name in path:
        at = at[_place(at, name, setting)] if isinstance(at, list) else at.setdefault(name, {})
        if not isinstance(at, (dict, list)):
            raise SpecError(f"--set {setting}: '{name}' holds a value, not a table")
    at[_place(at, last, setting) if isinstance(at, list) else last] = _value(text.strip())


def _place(items: list[Any], name: str, setting: str) -> int:
    if not name.isdigit() or int(name) >= len(items):
        raise SpecError(f"--set {setting}: '{name}' is not a place in a list of {len(items)}")
    return int(name)


def _value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text
