"""A toy corpus for language models: made-up sentences about who does what, one document to a file."""

from __future__ import annotations

import random
from pathlib import Path

from polyformer.train.recipe import TextRecipe
from tests.train.toy import NOUNS, VERBS


def write_texts(folder: Path, count: int = 24, seed: int = 0) -> Path:
    """Write `count` different documents of a few lines."""
    draw = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        lines = [f"The {draw.choice(NOUNS)} {draw.choice(VERBS)} the {draw.choice(NOUNS)}." for _ in range(12)]
        (folder / f"{number:02}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def text_recipe(folder: Path, train: dict[str, object] | None = None, **changes: object) -> TextRecipe:
    """Return a recipe that trains a tiny language model on the toy corpus in a second or two."""
    settings = {
        "budget": {"type": "Steps", "count": 12},
        "schedule": {"type": "Cosine", "peak": 3e-3, "warmup": 4},
        "precision": "fp32",
        "evaluations": 3,
        "log_every": 4,
        "smoothing": 0.0,
        "average": {"type": "Ema", "decay": 0.9},
        **(train or {}),
    }
    return TextRecipe.from_data(
        {
            "name": "toy-texts",
            "data": {"corpora": [{"type": "TextFiles", "paths": [str(folder)]}], "validation": 0.1, "test": 0.1},
            "tokenizer": {"kind": "byte_bpe", "vocabulary": 300},
            "model": {"width": 32, "depth": 2, "heads": 2, "feedforward": {"hidden": 64}},
            "batch": {"length": 32, "tokens": 128},
            "train": settings,
            "report": {"samples": 2, "prompt": 8, "sampling": {"limit": 8}, "watched": 256},
            **changes,
        }
    )
