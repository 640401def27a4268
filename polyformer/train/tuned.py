"""Tuning from a recipe to a run folder: the base, the examples, the method, and what is kept in the end.

While it is trained, the folder holds `recipe.toml`, `splits/`, `metrics.jsonl`, `samples/` and `checkpoints/`; when it
has ended, what the method keeps lies beside them: a model in the reference library's layout, or an adapter in PEFT's.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from polyformer.data.examples import (
    COLUMNS,
    Example,
    Examples,
    ExampleSplits,
    Kind,
    read_examples,
    split_examples,
    without,
    write_examples,
)
from polyformer.data.guess import texts_of
from polyformer.data.labelled import pictures_in
from polyformer.errors import DataError, RunError, SpecError
from polyformer.judge import Sample
from polyformer.loaded import Loaded, load
from polyformer.parts.model import Transformer, TransformerPart
from polyformer.swap import drift
from polyformer.train.encoder_lessons import Classifying, Relating, Seeing, Tagging
from polyformer.train.jobs import Opened, Work
from polyformer.train.lessons import Conversing, Lesson, Reading, TuneScores
from polyformer.train.pair_lessons import Responding
from polyformer.train.report import quoted
from polyformer.train.tuning import (
    Classify,
    ClassifyImages,
    Converse,
    ReadTexts,
    Relate,
    Respond,
    TagWords,
    TuneData,
    TuneRecipe,
    TuneTask,
)
from polyformer.tune import prompt_ids
from polyformer.weights.assemble import disassemble

PARTS = ("train", "validation")

LESSONS: Mapping[type[TuneTask], type[Lesson]] = {
    Classify: Classifying,
    ClassifyImages: Seeing,
    Converse: Conversing,
    ReadTexts: Reading,
    Relate: Relating,
    Respond: Responding,
    TagWords: Tagging,
}
TASKS: Mapping[Kind, TuneTask] = {
    "messages": Converse(),
    "completion": Converse(),
    "labelled": Classify(),
    "pictured": ClassifyImages(),
    "tagged": TagWords(),
    "related": Relate(),
    "answered": Respond(),
    "text": ReadTexts(),
}
"""What examples of a kind are for, where a recipe doesn't say."""


class OfTuning(Work[TuneRecipe]):
    """From a model that is there, and examples, to one that was tuned to them."""

    @functools.cached_property
    def base(self) -> Loaded:
        """The model that tuning begins with."""
        return load_base(self.recipe.base)

    @functools.cached_property
    def lesson(self) -> Lesson:
        """What is done with the examples."""
        assert self.recipe.task is not None
        return LESSONS[type(self.recipe.task)](self.recipe, self.base)

    @functools.cached_property
    def prepared(self) -> Loaded:
        """The model that is trained, with a new head where it lacks one, and what the method adds."""
        headed = self.lesson.headed(self.base)
        return self.recipe.method.prepare(headed, self.lesson.new)

    @property
    def what(self) -> str:
        return self.lesson.what

    def prepare(self, folder: Path) -> TuneRecipe:
        splits = read_splits(self.recipe.data, self.recipe.task)
        self.recipe = self.recipe.replace(task=_task(self.recipe, splits.kind))
        self.recipe = self.lesson.settled(splits).replace(base_hash=hash_of(self.base.model))
        self.lesson.recipe = self.recipe
        with torch.random.fork_rng():
            spec = self.prepared.spec
        self.recipe = self.lesson.recipe = self.lesson.packed(spec)
        self._put_prompt()
        notes = [f"{name}: {note}" for name in PARTS for note in self.lesson.reader(getattr(splits, name))[1]]
        (folder / "splits").mkdir()
        for name in PARTS:
            write_examples(folder / "splits" / f"{name}.jsonl", getattr(splits, name))
        told = "\n".join((str(splits), *notes, *self.lesson.notes))
        (folder / "splits" / "report.txt").write_text(f"{told}\n", encoding="utf-8")
        return self.recipe

    def like(self, own: TuneRecipe) -> TuneRecipe:
        asked = self.recipe
        length, packing = asked.batch.length or own.batch.length, asked.batch.packing or own.batch.packing
        batch = asked.batch.replace(length=length, packing=packing)
        if batch.length == own.batch.length and batch.tokens < (batch.length or 0):
            batch = batch.replace(tokens=own.batch.tokens)
        task = own.task if asked.task is None or _resolves(asked.task, own.task) else asked.task
        return asked.replace(batch=batch, task=task, base_hash=own.base_hash)

    def spec(self) -> Transformer:
        return self.prepared.spec

    def begin(self, folder: Path) -> None:
        """Write nothing: what the model is, the base and the recipe say, and in the end the result itself."""

    def model(self) -> TransformerPart:
        return self.prepared.model

    def keep(self, model: TransformerPart, folder: Path) -> None:
        answers = self.lesson.answer if self.lesson.new else None
        self.recipe.method.keep(dataclasses.replace(self.prepared, model=model), folder, self.recipe.base, answers)

    def open(self, folder: Path) -> Opened:
        if self.recipe.base_hash not in (None, hash_of(self.base.model)):
            raise RunError(
                f"{self.recipe.base} holds another model than when this run began; put that back, or begin anew"
            )
        with torch.random.fork_rng():
            torch.manual_seed(self.recipe.train.seed)
            self._put_prompt()
        found = [read_examples(folder / "splits" / f"{name}.jsonl").rows for name in PARTS]
        train, validation = (self.lesson.reader(rows)[0] for rows in found)
        return Opened(
            train,
            validation,
            lambda model: self._judged(model, validation, found[1]),
            self.lesson.aim,
            lambda model, epoch: write_samples(folder, epoch, self.lesson.samples(model, found[1])),
        )

    def _judged(self, model: TransformerPart, validation: Any, examples: Sequence[Example]) -> TuneScores:
        """Measure the tuned model, and the base, which is loaded anew, as far as it has answers."""
        lesson = self.lesson
        held_out, figures = lesson.aim.held_out(model, validation.in_order()), lesson.figures(model, validation)
        samples = lesson.samples(model, examples)
        scores = TuneScores(held_out, figures=figures, samples=samples)
        if not lesson.answers:
            return scores
        loaded = load_base(self.recipe.base)
        plain, base = LESSONS[type(self.recipe.task)](self.recipe, loaded), loaded.model  # type: ignore[index]
        if lesson.before:  # which the base can't read
            validation, _ = plain.reader(examples)
        return dataclasses.replace(
            scores,
            before=lesson.aim.held_out(base, validation.in_order()),
            figures_before=lesson.figures(base, validation),
            drift=None if lesson.before else _drift(base, model, lesson.compared(validation)),
        )

    def _put_prompt(self) -> None:
        """Let the lesson put the ids of a trained prompt before every text."""
        ids = prompt_ids(self.prepared.spec)
        if ids and not isinstance(self.lesson, Conversing):
            raise SpecError("a prompt is trained on conversations and completions; for other examples, train a prefix")
        self.lesson.before = ids

    def told(self, verdict: Any) -> list[str]:
        assert isinstance(verdict, TuneScores)
        return sections(self.recipe, self.lesson, verdict)

    @property
    def about(self) -> str:
        model = self.prepared.model
        count = sum(p.numel() for p in model.parameters() if p.requires_grad)
        return f"{count:,} of them trained ({type(self.recipe.method).__name__}), from {self.recipe.base}"

    @property
    def commands(self) -> tuple[str, ...]:
        named = self.recipe.method.named.replace("{base}", self.recipe.base)
        told = tuple(command.replace("{run}", named) for command in self.lesson.commands)
        return (
            (*told, "inspect {run}") if named == "{run}" else (*told, f"merge {self.recipe.base} {{run}} --out merged")
        )


def judge_examples(loaded: Loaded, path: str, examples: Examples) -> TuneScores:
    """Measure a loaded model on examples of any kind, without tuning it.

    Args:
        path: what to call the model in messages.
    Raises:
        SpecError, DataError: a model that has no answer to such examples.
    """
    data = TuneData(examples.rows[0].where)
    recipe = TuneRecipe(path, path, data, TASKS[examples.kind])
    lesson = LESSONS[type(TASKS[examples.kind])](recipe, loaded)
    lesson.recipe = lesson.settled(ExampleSplits(examples.kind, examples.rows, examples.rows))
    if not lesson.answers:
        raise SpecError(f"{path} gives no scores to the labels of {examples.rows[0].where}; tune it to them first")
    reader, _ = lesson.reader(examples.rows)
    return TuneScores(
        lesson.aim.held_out(loaded.model, reader.in_order()), figures=lesson.figures(loaded.model, reader)
    )


def load_base(path: str) -> Loaded:
    """Load a model to be tuned, in single precision."""
    return load(path, dtype=torch.float32)


def read_splits(recipe: TuneData, task: TuneTask | None) -> ExampleSplits:
    """Read the examples and hold some out, or read those that are held out.

    Raises:
        DataError: as `read_examples` and `split_examples` do.
    """
    columns: Kind = next((kind for kind, one in TASKS.items() if type(one) is type(task)), "labelled")
    examples = _read(recipe.path, columns if columns in COLUMNS else "labelled")
    if recipe.held_out is not None:
        return without(examples, _read(recipe.held_out, columns))
    return split_examples(examples, recipe.validation, recipe.seed)


def _read(path: str, columns: Kind) -> Examples:
    if Path(path).suffix in (".jsonl", ".tsv"):
        return read_examples(path, columns)
    place = Path(path)
    if not place.exists():
        raise DataError(f"there is no file or folder {path}")
    if place.is_dir() and any(one.is_dir() for one in place.iterdir()):
        return Examples("pictured", [Example(one, one["image"]) for one in pictures_in(place)])
    found = [Example({"text": text}, name) for name, text in texts_of(path).documents() if text.strip()]
    if not found:
        raise DataError(f"{path} has no text")
    return Examples("text", found)


def _task(recipe: TuneRecipe, kind: Kind) -> TuneTask:
    """Return what is learnt; raises `SpecError` where examples of this kind don't serve that."""
    task = recipe.task or TASKS[kind]
    takes = LESSONS[type(task)].kinds
    if kind not in takes:
        told = (
            f"{type(task).__name__} learns from examples of {' or '.join(takes)}, and {recipe.data.path} holds {kind}"
        )
        raise SpecError(told)
    return task


def _resolves(asked: TuneTask, own: TuneTask | None) -> bool:
    """Tell whether `own` is `asked` with what was left open found out."""
    if type(asked) is not type(own):
        return False
    return all(value in (None, (), getattr(own, name)) for name, value in vars(asked).items())


def hash_of(model: TransformerPart) -> str:
    """Return a hash of a model's tensors and their names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(disassemble(model).items()):
        digest.update(name.encode())
        digest.update(tensor.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def _drift(base: TransformerPart, model: TransformerPart, inputs: Iterable[Any]) -> Any:
    given = list(inputs)
    return drift(base, model, given) if given else None


def write_samples(folder: Path, epoch: int, samples: Sequence[Sample]) -> None:
    """Write `samples/epoch-0001.jsonl`, beside and then into its place; nothing where there are none."""
    if not samples:
        return
    (folder / "samples").mkdir(exist_ok=True)
    beside = folder / "samples" / f".epoch-{epoch:04}"
    lines = (json.dumps(vars(one), ensure_ascii=False) + "\n" for one in samples)
    beside.write_text("".join(lines), encoding="utf-8")
    beside.replace(folder / "samples" / f"epoch-{epoch:04}.jsonl")


def sections(recipe: TuneRecipe, lesson: Lesson, scores: TuneScores) -> list[str]:
    """Return the sections of a report: what was learnt, how the model does beside its base, and some answers."""
    assert recipe.task is not None
    batch = recipe.batch
    rows_told = "" if batch.length is None else f", rows of {batch.length} tokens"
    head = f"- task: {type(recipe.task).__name__}{rows_told}{'' if batch.packing is None else f', {batch.packing}'}"
    rows = [("before", scores.before, scores.figures_before), ("after", scores.held_out, scores.figures)]
    names = list(scores.figures)
    lines = [f"| | loss | perplexity | {''.join(f'{name} | ' for name in names)}", "|---" * (3 + len(names)) + "|"]
    for name, held_out, figures in rows:
        if held_out is not None:
            more = "".join(f"{figures[one]:.4f} | " for one in names if one in figures)
            lines.append(f"| {name} | {held_out.loss:.4f} | {held_out.perplexity:.3f} | {more}")
    told = f"\n\nof {scores.held_out.tokens:,} {lesson.what}"
    found = [head, "## On held-out examples\n\n" + "\n".join(line.rstrip() for line in lines) + told]
    if scores.drift is not None:
        found.append(f"## Drift from the base\n\n```\n{scores.drift}\n```")
    if scores.samples:
        parts = [
            "\n\n".join(
                f"_{name}_\n\n{quoted(text)}" for name, text in zip(lesson.names, vars(one).values(), strict=True)
            )
            for one in scores.samples
        ]
        found.append("## Answers to held-out examples\n\n" + "\n\n---\n\n".join(parts))
    return found
