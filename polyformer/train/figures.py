"""Figures of a run, drawn from its metrics (matplotlib is an extra; without it a run has no figures)."""

from __future__ import annotations

from pathlib import Path

from polyformer.train.journal import Row


def draw_figures(rows: list[Row], folder: Path) -> list[Path]:
    """Draw the loss and the learning rate over steps as PNG; return the files, none without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return []
    folder.mkdir(parents=True, exist_ok=True)
    steps = [row for row in rows if "loss" in row]
    held_out = [row for row in rows if "validation_loss" in row]

    loss = Figure(figsize=(7, 4.2), dpi=120, layout="constrained")
    axes = loss.add_subplot()
    axes.plot([r["step"] for r in steps], [r["loss"] for r in steps], lw=1, alpha=0.6, label="training")
    if held_out:
        axes.plot([r["step"] for r in held_out], [r["validation_loss"] for r in held_out], "o-", label="validation")
    axes.set(xlabel="step", ylabel="negative log-likelihood (nats a token)", title="Loss")
    axes.grid(alpha=0.3)
    axes.legend()
    loss.savefig(folder / "loss.png")

    rate = Figure(figsize=(7, 3.2), dpi=120, layout="constrained")
    axes = rate.add_subplot()
    axes.plot([r["step"] for r in steps], [r["learning_rate"] for r in steps], lw=1.5)
    axes.set(xlabel="step", ylabel="learning rate", title="Learning rate")
    axes.grid(alpha=0.3)
    rate.savefig(folder / "learning_rate.png")
    return [folder / "loss.png", folder / "learning_rate.png"]
