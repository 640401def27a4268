"""A step of LoRA and QLoRA beside peft and the reference library: tokens a second, and memory at its highest.

    python benchmarks/tuning.py [--json FILE] [--model FILE] [--rounds 5] [--batch 4] [--length 256] [--rank 8]

Both train the same adapters beside the same weights, SmolLM2-135M's sizes unless told otherwise: `--model` names a GGUF
file or a folder (values don't matter to speed, so weights are random where none is named). A step is forward, backward,
clipping and AdamW in float32, on one batch. Their losses are compared first. In the table of speed, both take turns in
one process; in that of memory, each has a process of its own. Memory is what tensors take at most, counted by PyTorch's
allocator (weights and optimiser among them), and the process's own highest, without what it held before it had a model.
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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import polyformer as pf
from polyformer.bench.memory import memory_of
from polyformer.data.rows import TextBatch
from polyformer.families import Family, read_family
from polyformer.loaded import Loaded
from polyformer.parts.model import TransformerPart
from polyformer.shrink import Quantise
from polyformer.swap import transplant
from polyformer.train.loop import accumulate
from polyformer.train.optimisers import AdamW, clip_gradients
from polyformer.train.recipe import TrainRecipe
from polyformer.tune import LoraChange, attach

PLAIN, FOUR = "model", "model-nf4"
OURS, PEER, QLORA = "ours, LoRA", "peft, LoRA", "ours, QLoRA"
SMOLLM2 = {"vocabulary": 49152, "width": 576, "hidden": 1536, "layers": 30, "heads": 9, "groups": 3}
PARTS = ("weights", "state", "step", "tensors", "process")
WORK = {"rounds": 5, "batch": 4, "length": 256, "rank": 8}
FOLDERS = {OURS: PLAIN, PEER: PLAIN, QLORA: FOUR}


@dataclass
class Contender:
    """One way to train: `step` takes a step and returns its loss.

    Attributes:
        model: all of whose tensors count as weights.
        walls, own: seconds a step on the clock, and of the processor.
    """

    model: nn.Module
    step: Callable[[], float]
    walls: list[float] = field(default_factory=list)
    own: list[float] = field(default_factory=list)

    def run(self) -> None:
        """Take a step and note its times."""
        wall, own = time.perf_counter(), time.process_time()
        self.step()
        self.walls.append(time.perf_counter() - wall)
        self.own.append(time.process_time() - own)

    def bytes(self) -> int:
        """Return what the model's parameters and buffers take."""
        tensors = {one.data_ptr(): one for one in (*self.model.parameters(), *self.model.buffers())}
        return sum(one.numel() * one.element_size() for one in tensors.values())


def sizes_of(sizes: argparse.Namespace) -> dict[str, Any]:
    """Return the `config.json` of a random model: LLaMA's layout, tied head."""
    return {
        "model_type": "llama",
        "vocab_size": sizes.vocabulary,
        "hidden_size": sizes.width,
        "intermediate_size": sizes.hidden,
        "num_hidden_layers": sizes.layers,
        "num_attention_heads": sizes.heads,
        "num_key_value_heads": sizes.groups,
        "max_position_embeddings": 2048,
        "rope_theta": 100000,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
    }


def prepare(sizes: argparse.Namespace, folder: Path) -> dict[str, float]:
    """Write the model's folders, in float32 and with matrices in four bits; return how far apart their weights are."""
    if sizes.model:
        loaded = pf.load(sizes.model, dtype=torch.float32)
        loaded.text_tokenizer = None
    else:
        family: Family = read_family(sizes_of(sizes), "config.json")
        model = family.spec().build()
        assert isinstance(model, TransformerPart)
        loaded = Loaded(model, family=family)
    pf.save(loaded, folder / PLAIN)
    quantised, _ = transplant(loaded.model, Quantise())
    pf.save(Loaded(quantised), folder / FOUR)
    before, after = (sum(t.numel() * t.element_size() for t in weights(one)) for one in (loaded.model, quantised))
    inner = [one for one in (loaded.model.encoder, loaded.model.decoder) if one is not None]
    blocks = sum(t.numel() * t.element_size() for one in inner for t in weights(one))
    return {"weights": before, "four": after, "blocks": blocks, "blocks four": after - (before - blocks)}


def weights(model: nn.Module) -> list[Tensor]:
    """Return each tensor of a model once."""
    return list({one.data_ptr(): one for one in (*model.parameters(), *model.buffers())}.values())


def batch_of(sizes: argparse.Namespace) -> Tensor:
    """Return token ids [B, S + 1]."""
    draw = torch.Generator().manual_seed(1)
    return torch.randint(5, sizes.vocabulary, (sizes.batch, sizes.length + 1), generator=draw)


def ours(sizes: argparse.Namespace, folder: Path) -> Contender:
    """Return our loop's step."""
    torch.manual_seed(0)
    change = LoraChange(rank=sizes.rank, alpha=2.0 * sizes.rank, dropout=sizes.dropout)
    model = attach(pf.load(folder).model, change).train()
    optimiser, recipe = AdamW().build(model), TrainRecipe(precision="fp32", smoothing=0.0)
    for group in optimiser.param_groups:
        group["lr"] = 1e-4
    ids = batch_of(sizes)
    rows = np.arange(sizes.batch)
    batch = TextBatch(ids[:, :-1], ids[:, 1:], None, None, sizes.batch * sizes.length, rows)

    def step() -> float:
        objective, _, tokens = accumulate(model, [batch], recipe)
        clip_gradients(model, 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        return objective / tokens

    return Contender(model, step)


def peer(sizes: argparse.Namespace, folder: Path) -> Contender:
    """Return the step of a loop around peft's model, as its documentation has it, with PyTorch's fused AdamW."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    rank, dropout = sizes.rank, sizes.dropout
    config = LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=dropout, target_modules="all-linear")
    model: Any = get_peft_model(base, config).train()
    wanted = [one for one in model.parameters() if one.requires_grad]
    optimiser = torch.optim.AdamW(wanted, lr=1e-4, fused=True)
    ids = batch_of(sizes)

    def step() -> float:
        given = {"input_ids": ids[:, :-1], "labels": ids[:, :-1], "shift_labels": ids[:, 1:].contiguous()}
        loss = model(**given, use_cache=False).loss
        loss.backward()
        nn.utils.clip_grad_norm_(wanted, 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        return float(loss.detach())

    return Contender(model, step)


def contender(name: str, sizes: argparse.Namespace, folder: Path) -> Contender:
    """Return the contender of a name."""
    return (peer if name == PEER else ours)(sizes, folder / FOLDERS[name])


def resident(highest: bool = True) -> int:
    """Return the bytes that the process has in memory, or had at the highest since that was last forgotten."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    name = "VmHWM:" if highest else "VmRSS:"
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def alone(name: str, sizes: argparse.Namespace, folder: Path) -> dict[str, float]:
    """Measure the memory of one contender; for a process of its own."""
    if name == PEER:
        import peft
        import transformers

        assert peft.LoraConfig, transformers.LlamaForCausalLM
    before = resident(highest=False)
    one = contender(name, sizes, folder)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # what loading took is another matter
    one.step()  # reads all weights, and makes the optimiser's state
    process = resident() - before
    taken = memory_of(lambda: [torch.tensor(one.step())])
    state = sum(t.numel() * t.element_size() for t in _states(one))
    return {"weights": one.bytes(), "state": state, "step": taken.peak, "process": process}


def _states(one: Contender) -> list[Tensor]:
    """Return what an optimiser of all trained parameters keeps: two moments each."""
    return [p for p in one.model.parameters() if p.requires_grad for _ in range(2)]


def memory(name: str, arguments: list[str], folder: Path) -> dict[str, float]:
    """Run `alone` in a process of its own."""
    command = [sys.executable, __file__, *arguments, "--one", name, "--folder", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ)
    if done.returncode:
        raise SystemExit(f"{name} failed:\n{done.stderr[-2000:]}")
    told: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return told


def speed(sizes: argparse.Namespace, folder: Path, names: list[str]) -> dict[str, Any]:
    """Let contenders take turns and print their rates; the best of each counts, and the median of rounds beside it."""
    made = {name: contender(name, sizes, folder) for name in names}
    losses = {name: one.step() for name, one in made.items()}
    print("loss at first: " + ", ".join(f"{name} {loss:.4f}" for name, loss in losses.items()))
    if PEER in losses:
        assert abs(losses[OURS] - losses[PEER]) < 1e-3 * losses[PEER], "they don't train the same model"
    for _ in range(sizes.rounds):
        for one in made.values():
            one.run()
    tokens, told = sizes.batch * sizes.length, dict[str, Any]()
    for name, one in made.items():
        wall = [a / b for a, b in zip(one.walls, made[OURS].walls, strict=True)]
        ratio, own = statistics.median(wall), min(one.own) / min(made[OURS].own)
        told[name] = {"tokens/s": tokens / min(one.walls), "ours is": min(one.walls) / min(made[OURS].walls)}
        told[name] |= {"median of rounds": ratio, "processor time": own}
        rate, best = told[name]["tokens/s"], told[name]["ours is"]
        print(f"{name:14} {rate:7.0f} tokens/s   ours is {best:.2f} x (by rounds {ratio:.2f}, processor {own:.2f})")
    return told


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--model")
    for name, value in (SMOLLM2 | WORK).items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--dropout", type=float, default=0.0, help="of what LoRA's first matrix sees")
    parser.add_argument("--only", choices=("speed", "memory"))
    parser.add_argument("--without-peer", action="store_true")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    sizes = parser.parse_args()
    if sizes.one:
        print(json.dumps(alone(sizes.one, sizes, sizes.folder)))
        return
    names = [OURS, QLORA] if sizes.without_peer else [OURS, PEER, QLORA]
    told: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        told["bytes"] = held = prepare(sizes, folder)
        share, inner = held["four"] / held["weights"], held["blocks four"] / held["blocks"]
        print(f"weights: {held['weights'] / 1e6:.0f} MB, in NF4 {share:.3f} of that; of the blocks alone {inner:.3f}")
        if sizes.only != "speed":
            told["memory"] = {name: memory(name, sys.argv[1:], folder) for name in names}
            first = told["memory"][OURS]
            for name, one in told["memory"].items():
                one["tensors"] = one["weights"] + one["state"] + one["step"]
                parts = "  ".join(f"{key} {one[key] / 1e6:6.0f}" for key in PARTS)
                share = one["tensors"] / first["tensors"], one["process"] / first["process"]
                print(f"{name:14} MB: {parts}   of ours with LoRA: tensors {share[0]:.2f}, process {share[1]:.2f}")
        if sizes.only != "memory":
            told["speed"] = speed(sizes, folder, names)
    if sizes.json:
        sizes.json.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
