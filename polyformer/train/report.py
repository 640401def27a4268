"""A report on a finished run that a person can read."""

from __future__ import annotations

import platform
from pathlib import Path

import torch

from polyformer.judge import Evaluation
from polyformer.parts.model import TransformerPart, parameters_of
from polyformer.train.journal import Row
from polyformer.train.recipe import Recipe


def write_report(out: Path, recipe: Recipe, rows: list[Row], scores: Evaluation, model: TransformerPart) -> None:
    """Write `report.md`: what was trained on what, how it went, how good it is, and some translations."""
    sections = [
        f"# {recipe.name}",
        _summary(recipe, rows, model),
        _scores(scores),
        _samples(recipe, scores),
        "## Data\n\n```\n" + (out / "splits" / "report.txt").read_text(encoding="utf-8").rstrip() + "\n```",
    ]
    figures = [f"![{path.stem}](figures/{path.name})" for path in sorted((out / "figures").glob("*.png"))]
    if figures:
        sections.append("## Figures\n\n" + "\n".join(figures))
    sections.append(
        "## Use it\n\n```\n"
        f'polyformer translate {out} "Save the file"\n'
        f'polyformer explain {out} "Save the file" --out attention.png\n'
        f"polyformer inspect {out}\n```"
    )
    (out / "report.md").write_text("\n\n".join(sections) + "\n", encoding="utf-8")


def _summary(recipe: Recipe, rows: list[Row], model: TransformerPart) -> str:
    steps = [row for row in rows if "loss" in row]
    held_out = [row["validation_loss"] for row in rows if "validation_loss" in row]
    lines = [
        f"- directions: {', '.join(recipe.data.directions)}",
        f"- parameters: {parameters_of(model):,}; vocabulary {recipe.tokenizer.vocabulary:,} ({recipe.tokenizer.kind})",
        f"- precision: {recipe.train.precision}; PyTorch {torch.__version__}, {torch.get_num_threads()} threads, "
        f"{platform.machine()}",
    ]
    if steps:
        last = steps[-1]
        seconds = max(last["seconds"], 1e-9)
        lines.append(
            f"- training: {last['step']:,} steps, {last['epoch']:.1f} epochs, {last['tokens']:,} target tokens in "
            f"{seconds:.0f} s ({last['tokens'] / seconds:,.0f} a second)"
        )
        lines.append(f"- training loss at the end: {last['loss']:.3f} nats a token")
    if held_out:
        lines.append(f"- validation loss: {held_out[-1]:.3f} at the end, {min(held_out):.3f} at best")
    return "\n".join(lines)


def _scores(scores: Evaluation) -> str:
    table = ["| direction | pairs | BLEU | chrF | loss | perplexity |", "|---|---|---|---|---|---|"]
    for one in scores.directions:
        numbers = (
            f"{one.bleu.value:.1f} | {one.chrf.value:.1f} | {one.held_out.loss:.3f} | {one.held_out.perplexity:.2f}"
        )
        table.append(f"| {one.name} | {len(one.pairs):,} | {numbers} |")
    signatures = {signature for one in scores.directions for signature in (one.bleu.signature, one.chrf.signature)}
    signed = "\n".join(f"- `{signature}`" for signature in sorted(signatures))
    return "## Scores on held-out pairs\n\n" + "\n".join(table) + f"\n\n{signed}"


def samples(recipe: Recipe, scores: Evaluation) -> list[tuple[str, str, str]]:
    """Return (source, translation, reference) of some held-out pairs, spread evenly over each direction."""
    found = []
    each = max(1, recipe.report.samples // max(len(scores.directions), 1))
    for one in scores.directions:
        stride = max(1, len(one.pairs) // each)
        for pair, translation in list(zip(one.pairs, one.translations, strict=True))[::stride][:each]:
            found.append((pair.source, translation.text, pair.target))
    return found


def _samples(recipe: Recipe, scores: Evaluation) -> str:
    shown = [f"- {s}\n  - **{t}**\n  - _{r}_" for s, t, r in samples(recipe, scores)]
    return "## Translations of unseen sentences\n\nsource, **translation**, _reference_\n\n" + "\n".join(shown)
