"""A report on a finished run that a person can read."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from pathlib import Path

import torch

from polyformer.judge import Evaluation, TextEvaluation
from polyformer.parts.model import TransformerPart, parameters_of
from polyformer.train.journal import Row
from polyformer.train.recipe import Job, Recipe, TextRecipe


@dataclass(frozen=True)
class Told:
    """What a kind of recipe adds to a report.

    Attributes:
        tokens: what its tokens are.
        about: what there is to say of the model beside its size.
        sections: the first one is a list.
        commands: with `{run}` in them.
    """

    tokens: str
    about: str
    sections: list[str]
    commands: tuple[str, ...]


def write_report(out: Path, recipe: Job, rows: list[Row], told: Told, model: TransformerPart) -> None:
    """Write `report.md`: what was trained on what, how it went, how good it is, and some samples."""
    head, *others = told.sections
    sections = [
        f"# {recipe.name}",
        f"{head}\n{_summary(recipe, rows, told, model)}",
        *others,
        "## Data\n\n```\n" + (out / "splits" / "report.txt").read_text(encoding="utf-8").rstrip() + "\n```",
    ]
    figures = [f"![{path.stem}](figures/{path.name})" for path in sorted((out / "figures").glob("*.png"))]
    if figures:
        sections.append("## Figures\n\n" + "\n".join(figures))
    commands = "\n".join(f"polyformer {command.format(run=out)}" for command in told.commands)
    sections.append(f"## Use it\n\n```\n{commands}\n```")
    (out / "report.md").write_text("\n\n".join(sections) + "\n", encoding="utf-8")


def _summary(recipe: Job, rows: list[Row], told: Told, model: TransformerPart) -> str:
    steps = [row for row in rows if "loss" in row]
    held_out = [row["validation_loss"] for row in rows if "validation_loss" in row]
    lines = [
        f"- parameters: {parameters_of(model):,}; {told.about}",
        f"- precision: {recipe.train.precision}; PyTorch {torch.__version__}, {torch.get_num_threads()} threads, "
        f"{platform.machine()}",
    ]
    if steps:
        last = steps[-1]
        seconds = max(last["seconds"], 1e-9)
        lines.append(
            f"- training: {last['step']:,} steps, {last['epoch']:.1f} epochs, {last['tokens']:,} {told.tokens} in "
            f"{seconds:.0f} s ({last['tokens'] / seconds:,.0f} a second)"
        )
        lines.append(f"- training loss at the end: {last['loss']:.3f} nats a token")
    if held_out:
        lines.append(f"- validation loss: {held_out[-1]:.3f} at the end, {min(held_out):.3f} at best")
    return "\n".join(lines)


def pair_sections(recipe: Recipe, scores: Evaluation) -> list[str]:
    """Return the sections on a translation model: its directions, scores and some translations."""
    table = ["| direction | pairs | BLEU | chrF | loss | perplexity |", "|---|---|---|---|---|---|"]
    for one in scores.directions:
        numbers = (
            f"{one.bleu.value:.1f} | {one.chrf.value:.1f} | {one.held_out.loss:.3f} | {one.held_out.perplexity:.2f}"
        )
        table.append(f"| {one.name} | {len(one.pairs):,} | {numbers} |")
    signatures = {signature for one in scores.directions for signature in (one.bleu.signature, one.chrf.signature)}
    signed = "\n".join(f"- `{signature}`" for signature in sorted(signatures))
    shown = [f"- {s}\n  - **{t}**\n  - _{r}_" for s, t, r in samples(recipe, scores)]
    return [
        f"- directions: {', '.join(recipe.data.directions)}",
        "## Scores on held-out pairs\n\n" + "\n".join(table) + f"\n\n{signed}",
        "## Translations of unseen sentences\n\nsource, **translation**, _reference_\n\n" + "\n".join(shown),
    ]


def samples(recipe: Recipe, scores: Evaluation) -> list[tuple[str, str, str]]:
    """Return (source, translation, reference) of some held-out pairs, spread evenly over each direction."""
    found = []
    each = max(1, recipe.report.samples // max(len(scores.directions), 1))
    for one in scores.directions:
        stride = max(1, len(one.pairs) // each)
        for pair, translation in list(zip(one.pairs, one.translations, strict=True))[::stride][:each]:
            found.append((pair.source, translation.text, pair.target))
    return found


def text_sections(recipe: TextRecipe, scores: TextEvaluation) -> list[str]:
    """Return the sections on a language model: what it learnt, its scores, and some of what it writes."""
    objective, rows = recipe.objective, recipe.batch
    held_out = scores.held_out
    lines = [
        "| documents | tokens | loss | perplexity | bits per byte |",
        "|---|---|---|---|---|",
        f"| {scores.documents:,} | {held_out.tokens:,} | {held_out.loss:.3f} | {held_out.perplexity:.2f} | "
        f"{'–' if scores.bits_per_byte is None else f'{scores.bits_per_byte:.3f}'} |",
    ]
    sections = [
        f"- objective: {type(objective).__name__}, rows of {rows.length} tokens, documents {rows.documents}",
        "## Scores on held-out texts\n\n" + "\n".join(lines),
    ]
    if scores.samples:
        masked = objective.reads == "both ways"
        names = ("with masks", "filled", "as it stands there") if masked else ("given", "written", "as it stands there")
        parts = [
            "\n\n".join(f"_{name}_\n\n{quoted(text)}" for name, text in zip(names, vars(one).values(), strict=True))
            for one in scores.samples
        ]
        sections.append("## On unseen texts\n\n" + "\n\n---\n\n".join(parts))
    return sections


def quoted(text: str) -> str:
    """Show a text as it is, whatever marks are in it."""
    return "\n".join(f"    {line}" for line in text.split("\n"))
