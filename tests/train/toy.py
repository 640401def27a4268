"""A toy language to train on: words are translated one by one and the sentence is turned round."""

from __future__ import annotations

import random
from pathlib import Path

from polyformer.train.recipe import Recipe

NOUNS = [
    "house",
    "tree",
    "river",
    "mountain",
    "window",
    "garden",
    "letter",
    "bridge",
    "flower",
    "table",
    "candle",
    "forest",
]
VERBS = ["sees", "finds", "takes", "keeps", "paints", "leaves"]


def foreign(word: str) -> str:
    """Return the toy translation of a word."""
    return word[::-1] + "u"


def write_corpus(path: Path, count: int = 400, seed: int = 0) -> Path:
    """Write a TSV of `count` different sentence pairs."""
    draw = random.Random(seed)
    seen: set[str] = set()
    while len(seen) < count:
        words = ["the", draw.choice(NOUNS), draw.choice(VERBS), "the", draw.choice(NOUNS)]
        if draw.random() < 0.5:
            words += ["and", "the", draw.choice(NOUNS)]
        seen.add(" ".join(words))
    lines = [f"{s}\t{' '.join(foreign(w) for w in reversed(s.split()))}\n" for s in sorted(seen)]
    path.write_text("".join(lines), encoding="utf-8")
    return path


def recipe(corpus: Path, **train: object) -> Recipe:
    """Return a recipe that trains a tiny model on the toy corpus in a second or two."""
    settings = {
        "budget": {"type": "Steps", "count": 24},
        "schedule": {"type": "Noam", "peak": 3e-3, "warmup": 10},
        "precision": "fp32",
        "evaluations": 3,
        "log_every": 4,
        "average": {"type": "Ema", "decay": 0.9},
        **train,
    }
    return Recipe.from_data(
        {
            "name": "toy",
            "data": {"corpora": [{"type": "Tsv", "path": str(corpus)}], "validation": 0.1, "test": 0.1},
            "tokenizer": {"vocabulary": 120},
            "model": {
                "width": 32,
                "depth": {"encoder": 1, "decoder": 1},
                "attention": {"heads": 4},
                "feedforward": {"hidden": 64},
                "ties": "all",
            },
            "batch": {"tokens": 256},
            "train": settings,
            "report": {"pairs": 8, "samples": 2},
        }
    )
