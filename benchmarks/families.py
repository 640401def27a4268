"""Forward, and forward with backward, beside the reference library with the same weights; and loading a GGUF file.

    python benchmarks/families.py [--json FILE] [--rounds 5] [--batch 1 8] [--gguf FILE] [--models gpt2 bert t5 vit]

Both run in turn, round by round, so that the machine's moods reach them alike; the reference uses PyTorch's
scaled_dot_product_attention. Weights are random, saved by the reference and read here; outputs are compared first.
Loading is measured in fresh processes, which read the file from the disk's cache.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import polyformer as pf


@dataclass(frozen=True)
class Subject:
    """One kind of model: the reference's classes, the keys of its configuration, and what it reads."""

    model: str
    config: str
    keys: dict[str, Any]
    inputs: Callable[[int], dict[str, Tensor]]


def ids(vocabulary: int, length: int) -> Callable[[int], Tensor]:
    """Return a maker of random ids [batch, length]."""
    return lambda batch: torch.randint(5, vocabulary, (batch, length))


SUBJECTS = {
    "gpt2": Subject(
        "GPT2LMHeadModel",
        "GPT2Config",
        {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0},
        lambda batch: {"input_ids": ids(50257, 256)(batch)},
    ),
    "bert": Subject(
        "BertForMaskedLM",
        "BertConfig",
        {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
        lambda batch: {"input_ids": ids(30522, 256)(batch)},
    ),
    "t5": Subject(
        "T5ForConditionalGeneration",
        "T5Config",
        {"dropout_rate": 0.0},
        lambda batch: {"input_ids": ids(32100, 256)(batch), "decoder_input_ids": ids(32100, 64)(batch)},
    ),
    "vit": Subject(
        "ViTForImageClassification",
        "ViTConfig",
        {"hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536},
        lambda batch: {"pixel_values": torch.randn(batch, 3, 224, 224)},
    ),
}


def timed(work: Callable[[], Any], rounds: int, other: Callable[[], Any]) -> tuple[float, float]:
    """Return the median seconds of two works that take turns."""
    times: tuple[list[float], list[float]] = ([], [])
    for one in (work, other):
        one()
    for i in range(rounds):
        for which in (0, 1) if i % 2 else (1, 0):
            start = time.perf_counter()
            (work, other)[which]()
            times[which].append(time.perf_counter() - start)
    return statistics.median(times[0]), statistics.median(times[1])


def compare(name: str, batches: list[int], rounds: int) -> list[dict[str, Any]]:
    """Time one kind of model; returns a row for each batch size and each of forward and forward + backward."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    subject = SUBJECTS[name]
    torch.manual_seed(0)
    config = getattr(transformers, subject.config)(**subject.keys)
    config._attn_implementation = "sdpa"
    reference = getattr(transformers, subject.model)(config).eval()
    with tempfile.TemporaryDirectory() as folder:
        reference.save_pretrained(folder)
        ours: Any = pf.load(folder).model
        rows = []
        for batch in batches:
            data = subject.inputs(batch)
            own, other = (lambda data=data: ours(**data).logits), (lambda data=data: reference(**data).logits)
            with torch.no_grad():
                worst = float((own() - other()).abs().max())
                rows.append(row(name, batch, "forward", timed(own, rounds, other), worst))
            both = (lambda one=own: train(ours, one)), (lambda one=other: train(reference, one))
            rows.append(row(name, batch, "forward+backward", timed(both[0], rounds, both[1]), worst))
    return rows


def train(model: Any, forward: Callable[[], Tensor]) -> None:
    """One pass forward and backward."""
    model.zero_grad(set_to_none=True)
    forward().square().mean().backward()


def row(name: str, batch: int, what: str, seconds: tuple[float, float], worst: float) -> dict[str, Any]:
    """One line of the table."""
    ours, theirs = seconds
    print(
        f"{name:6} batch {batch}  {what:17} ours {ours:7.3f} s, reference {theirs:7.3f} s, "
        f"{theirs / ours:5.2f} x as fast, logits differ by {worst:.1e}",
        flush=True,
    )
    return {"model": name, "batch": batch, "what": what, "ours": ours, "reference": theirs, "difference": worst}


OURS = "import sys, time; import polyformer, polyformer.loaded as l; t = time.perf_counter(); m = l.load(sys.argv[1])"
THEIRS = """
import sys, time, pathlib, torch, transformers
transformers.utils.logging.disable_progress_bar()
path = pathlib.Path(sys.argv[1])
from transformers import AutoModelForCausalLM, AutoTokenizer
t = time.perf_counter()
m = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
"""
REPORT = """
seconds = time.perf_counter() - t
status = open("/proc/self/status").read() if sys.platform == "linux" else "VmHWM: nan"
print(seconds, status.split("VmHWM:")[1].split()[0])  # not ru_maxrss, which a child inherits from its parent
"""


def loading(path: Path, rounds: int) -> dict[str, Any]:
    """Time loading a GGUF file, model and tokenizer, after the imports."""
    found: dict[str, list[tuple[float, float]]] = {"ours": [], "reference": []}
    for _ in range(rounds):
        for name, code in (("ours", OURS), ("reference", THEIRS)):
            offline = {**os.environ, "HF_HUB_OFFLINE": "1"}
            command = [sys.executable, "-W", "ignore", "-c", code + REPORT, str(path)]
            done = subprocess.run(command, capture_output=True, text=True, env=offline)
            if done.returncode:
                raise SystemExit(f"loading {path} failed ({name}): {done.stderr.strip().splitlines()[-1]}")
            seconds, kilobytes = done.stdout.split()[-2:]
            found[name].append((float(seconds), float(kilobytes) / 1e3))
    told = {name: tuple(map(statistics.median, zip(*runs, strict=True))) for name, runs in found.items()}
    print(
        f"loading {path.name}: ours {told['ours'][0]:.2f} s, reference {told['reference'][0]:.2f} s, "
        f"{told['reference'][0] / told['ours'][0]:.1f} x as fast; peak of the process {told['ours'][1]:.0f} MB "
        f"and {told['reference'][1]:.0f} MB"
    )
    return {"file": path.name, **told}


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--models", nargs="*", choices=SUBJECTS, default=list(SUBJECTS))
    parser.add_argument("--gguf", type=Path)
    options = parser.parse_args()
    rows = [row for name in options.models for row in compare(name, options.batch, options.rounds)]
    told: dict[str, Any] = {"models": rows}
    if options.gguf is not None:
        told["loading"] = loading(options.gguf, options.rounds)
    if options.json is not None:
        options.json.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
