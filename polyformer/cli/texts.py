"""Judging language models from the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from polyformer.errors import RunError, SpecError

if TYPE_CHECKING:
    from polyformer.data.documents import Document
    from polyformer.data.examples import Examples
    from polyformer.data.masking import TextObjective
    from polyformer.data.rows import RowRecipe
    from polyformer.judge.held_out import HeldOut
    from polyformer.loaded import Loaded


def evaluate_language_model(run: Path, loaded: Loaded, data: Path | None, limit: int | None, as_json: bool) -> None:
    """Print loss, perplexity and bits per byte on texts: those of a file or folder, or the run's own test split."""
    from polyformer.data.examples import read_examples
    from polyformer.judge import evaluate_texts

    if data is not None and data.suffix in (".jsonl", ".tsv"):
        examples = read_examples(data)
        if examples.kind != "text":
            examples.rows = examples.rows[:limit]
            _evaluate_examples(run, loaded, examples, as_json)
            return
    if loaded.model.head is None:
        raise SpecError("a loss needs a model with a language model head, and this one has none")
    rows, objective = _reading(run, loaded)
    documents = _documents(run, data)[:limit]
    found = evaluate_texts(loaded.model, loaded.texts, documents, rows, objective)
    if as_json:
        typer.echo(json.dumps(found.to_data(), ensure_ascii=False))
        return
    typer.echo(f"{found.documents:,} texts in rows of {rows.length} tokens, {found.seconds:.1f} s")
    _print_loss(found.held_out, "nats a token", 14)
    if found.bits_per_byte is not None:
        typer.echo(f"  {'bits per byte':<14}{found.bits_per_byte:8.3f}  of {found.bytes:,} bytes")


def _print_loss(found: HeldOut, unit: str, width: int) -> None:
    typer.echo(f"  {'loss':<{width}}{found.loss:8.3f}  {unit}, of {found.tokens:,}")
    typer.echo(f"  {'perplexity':<{width}}{found.perplexity:8.2f}")


def _evaluate_examples(run: Path, loaded: Loaded, examples: Examples, as_json: bool) -> None:
    """Print the loss of what examples ask for, and how many labels are right."""
    from polyformer.train.tuned import judge_examples

    found = judge_examples(loaded, str(run), examples)
    if as_json:
        typer.echo(json.dumps(found.to_data(), ensure_ascii=False))
        return
    typer.echo(f"{len(examples.rows):,} examples of {examples.kind}")
    _print_loss(found.held_out, "nats each", 16)
    for name, value in found.figures.items():
        typer.echo(f"  {name:<16}{value:8.4f}")


def _reading(run: Path, loaded: Loaded) -> tuple[RowRecipe, TextObjective]:
    """Return the rows and the objective of a run's recipe; of another model, what its parts allow."""
    from polyformer.data.masking import MaskedTokens, NextToken
    from polyformer.data.rows import RowRecipe
    from polyformer.generate.search import positions_of
    from polyformer.train.recipe import Job, TextRecipe

    if (run / "recipe.toml").is_file():
        recipe = Job.from_toml((run / "recipe.toml").read_text(encoding="utf-8"), str(run / "recipe.toml"))
        if isinstance(recipe, TextRecipe):
            return recipe.batch, recipe.objective
    side = loaded.spec.target or loaded.spec.source
    longest = positions_of(side) if side is not None else None
    length = min(longest or 1024, 1024)
    objective = NextToken() if loaded.model.encoder is None else MaskedTokens()
    return RowRecipe(length=length, tokens=max(4096, length)), objective


def _documents(run: Path, data: Path | None) -> list[Document]:
    from polyformer.data.documents import Document, clean, read_documents
    from polyformer.data.guess import texts_of

    test = run / "splits" / "test.jsonl"
    if data is None or (test.exists() and data.exists() and data.samefile(test)):
        if not test.exists():
            raise RunError(f"{run} has no test split of its own; name texts with --data FILE")
        return read_documents(test)
    found = [Document(name, clean(text)) for name, text in texts_of(data).documents()]
    return [one for one in found if one.text]
