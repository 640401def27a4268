"""A recipe of tuning: a model that is there, examples, what is learnt of them, and which of its weights may change."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from polyformer.data.turns import Prompts, TurnRecipe
from polyformer.errors import SpecError
from polyformer.generate import Sampling
from polyformer.loaded import Loaded
from polyformer.loaded.adapted import write_adapter_into
from polyformer.loaded.files import write_into
from polyformer.loaded.heads import Answers
from polyformer.shrink import Quantise
from polyformer.spec import Record, field_types
from polyformer.swap import Swap, transplant
from polyformer.train.optimisers import AdamW
from polyformer.train.recipe import Job, TrainRecipe
from polyformer.train.schedules import Budget, Cosine, Epochs, Schedule
from polyformer.tune import LoraChange, attach, freeze


class TuneData(Record):
    """The examples.

    Attributes:
        path: JSON Lines of messages, of prompt and completion, of text, or of what else a task learns from; a table of
            two columns (`.tsv`); any other file or folder is plain text.
        held_out: a file of its own for validation; None: a share of the examples.
        validation: that share.
        seed: chooses them.
    """

    path: str
    held_out: str | None = None
    validation: float = 0.1
    seed: int = 0

    def check(self) -> None:
        self.require(0 < self.validation <= 0.5, "validation should be above 0, and at most half of the examples")


class TuneTask(Record, abstract=True):
    """What a model learns from examples; it says which of them it takes."""


class Converse(TuneTask):
    """To answer: the loss is of the assistant's tokens alone, or of completions.

    Attributes:
        prompts: whether prompt and completion are put as messages by the chat template ("chat"), or one behind the
            other ("plain"); None: "chat" where the model has a template.
    """

    prompts: Prompts | None = None


class ReadTexts(TuneTask):
    """To write on, or to fill masks: pretraining that goes on with other texts."""


class LabelTask(TuneTask, abstract=True):
    """To give labels. `labels` are those of the scores, in order; found out of the examples where none are named."""

    labels: tuple[str, ...] = ()

    def check(self) -> None:
        self.require(len(set(self.labels)) == len(self.labels), "each label should be named once")


class Classify(LabelTask):
    """To give a label to each text."""


class TagWords(LabelTask):
    """To give a label to each word."""


class ClassifyImages(LabelTask):
    """To give a label to each image; `together` are in a batch."""

    together: int = 32

    def check(self) -> None:
        super().check()
        self.require(self.together >= 1, f"together should be at least 1, not {self.together}")


class Relate(TuneTask):
    """To bring texts that belong together near each other, each held against all others of its batch.

    Attributes:
        temperature: what cosines are divided by.
        together: the pairs of a batch; with more, the task is harder and the vectors better.
    """

    temperature: float = 0.05
    together: int = 32

    def check(self) -> None:
        self.require(self.temperature > 0, f"temperature must be above 0, not {self.temperature}")
        self.require(self.together >= 2, f"together should be at least 2, not {self.together}")


class Respond(TuneTask):
    """To answer a source with a target. `language` is that of the targets, for a model that must be told."""

    language: str | None = None


class TuneMethod(Record, abstract=True):
    """Which weights change, and how the result is kept."""

    def prepare(self, loaded: Loaded, new: tuple[str, ...] = ()) -> Loaded:
        """Return the model to be trained; its parameters that may change want gradients, all others don't.

        Args:
            new: parameters of a new head, which must be trained.
        Raises:
            SpecError: it can't be done with this model.
        """
        raise NotImplementedError

    def keep(self, loaded: Loaded, folder: Path, base: str, answers: Answers | None) -> None:
        """Write the result into a folder.

        Args:
            base: what the model was loaded from.
            answers: what the labels of a new head are of.
        """
        raise NotImplementedError

    @property
    def named(self) -> str:
        """How the command line calls the result: `{run}` stands for its folder, `{base}` for the base."""
        return "{run}"


class Full(TuneMethod):
    """All weights, but those that patterns of `frozen` mean, such as "decoder.blocks.0.*" (see `tune.freeze`)."""

    frozen: tuple[str, ...] = ()

    def prepare(self, loaded: Loaded, new: tuple[str, ...] = ()) -> Loaded:
        loaded.model.requires_grad_(True)
        freeze(loaded.model, *self.frozen)
        if not any(one.requires_grad for one in loaded.model.parameters()):
            raise SpecError("all parameters are frozen, so there is nothing to train; freeze fewer of them")
        return loaded

    def keep(self, loaded: Loaded, folder: Path, base: str, answers: Answers | None) -> None:
        write_into(loaded, folder)


class Adapt(TuneMethod):
    """An adapter alone, beside a base that doesn't change.

    Attributes:
        change: the adapter.
        quantised: how the base is held meanwhile (QLoRA: Dettmers et al. 2023); None: as it is.
    """

    change: Swap = LoraChange()
    quantised: Quantise | None = None

    def prepare(self, loaded: Loaded, new: tuple[str, ...] = ()) -> Loaded:
        if loaded.family is None:
            raise SpecError(
                f"{loaded.folder} is no model of a published family, so an adapter of it has no place in PEFT's "
                "layout; tune it with --method full"
            )
        model = loaded.model if self.quantised is None else transplant(loaded.model, self.quantised)[0]
        change = self.change
        if new:
            heads = tuple(dict.fromkeys(name.rpartition(".")[0] for name in new))
            if "whole" not in field_types(type(change)):
                raise SpecError(
                    f"{type(change).__name__} can't train a new head beside it; choose LoRA, or --method full"
                )
            change = change.replace(whole=(*getattr(change, "whole", ()), *heads))
        return dataclasses.replace(loaded, model=attach(model, change))

    def keep(self, loaded: Loaded, folder: Path, base: str, answers: Answers | None) -> None:
        write_adapter_into(loaded, folder, base, answers)

    @property
    def named(self) -> str:
        return "{base} --adapter {run}"


class TuneTraining(TrainRecipe):
    """How a model is tuned: the fields of `TrainRecipe`, with what suits a model that knows much already."""

    budget: Budget = Epochs(3.0)
    schedule: Schedule = Cosine(peak=2e-5, warmup=10)
    optimiser: AdamW = AdamW(beta2=0.999, eps=1e-8, decay=0.0)
    smoothing: float = 0.0
    evaluations: int = 6


class TuneReport(Record):
    """What is shown of a tuned model: its answers to some held-out examples, after each epoch and in the end.

    Attributes:
        samples: how many.
        prompt: of plain texts, how many tokens are given.
        sampling: how answers are drawn; the likeliest tokens by default.
    """

    samples: int = 3
    prompt: int = 32
    sampling: Sampling = Sampling(limit=100)

    def check(self) -> None:
        self.require(self.samples >= 0, "samples can't be negative")
        self.require(self.prompt >= 1, "prompt must be at least 1")


class TuneRecipe(Job):
    """From a model that is there, and examples, to one that was tuned to them.

    Attributes:
        base: what `load` takes.
        task: what is learnt; None: what the examples and the model are made for.
        base_hash: of the base's tensors, so that a run goes on with the base that it began with; found out then.
    """

    base: str
    data: TuneData
    task: TuneTask | None = None
    method: TuneMethod = Full()
    batch: TurnRecipe = TurnRecipe()
    train: TuneTraining = TuneTraining()
    report: TuneReport = TuneReport()
    base_hash: str | None = None
