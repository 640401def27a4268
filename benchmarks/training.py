"""Training speed, in real target tokens per second, beside `torch.nn.Transformer` of the same sizes.

    python benchmarks/training.py [--json FILE] [--rounds 7] [--width 256] [--everywhere] [--bf16]

Three loops are run in turn, some steps each, so that the machine's moods reach all of them alike:

- ours: length-bucketed batches, fast dropout masks, the loss in chunks, fused AdamW;
- peer, identical batches: `torch.nn.Transformer`, full logits, fused AdamW;
- peer, the usual loop: random batches of as many tokens with padding, full logits, AdamW as it comes;

and then one step of ours on one batch, beside only its matrix products, of the same shapes in the same order.

Sentence lengths are drawn from a log-normal distribution (median 18, mean about 22 tokens), tokens at random: speed
does not depend on what they say.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from polyformer.data.batches import Batch, Batches, BatchRecipe, Column, Encoded
from polyformer.data.pairs import Pair
from polyformer.families.transformer import AttentionChoice, Depth, FeedForwardChoice, NormChoice, Transformer2017
from polyformer.parts.flow import start_flow
from polyformer.parts.model import TransformerPart
from polyformer.parts.positions import Sinusoidal
from polyformer.train.loop import accumulate
from polyformer.train.optimisers import AdamW, clip_gradients
from polyformer.train.recipe import TrainRecipe


class Peer(nn.Module):
    """`torch.nn.Transformer` with shared embeddings and sinusoidal positions: what its users write around it."""

    def __init__(self, sizes: argparse.Namespace, positions: Tensor) -> None:
        super().__init__()
        self.embed = nn.Embedding(sizes.vocabulary, sizes.width)
        nn.init.normal_(self.embed.weight, std=sizes.width**-0.5)
        self.body = nn.Transformer(
            sizes.width, sizes.heads, sizes.layers, sizes.layers, 4 * sizes.width, sizes.dropout, batch_first=True
        )
        self.drop = nn.Dropout(sizes.dropout)
        self.register_buffer("positions", positions)
        self.scale = sizes.width**0.5

    def forward(self, source: Tensor, padding: Tensor, target: Tensor) -> Tensor:
        """ids [B, T], padding [B, T] True where padded, ids [B, S] -> logits [B, S, V]."""
        x = self.drop(self.embed(source) * self.scale + self.positions[: source.shape[1]])
        y = self.drop(self.embed(target) * self.scale + self.positions[: target.shape[1]])
        causal = nn.Transformer.generate_square_subsequent_mask(target.shape[1])
        out = self.body(
            x, y, tgt_mask=causal, src_key_padding_mask=padding, memory_key_padding_mask=padding, tgt_is_causal=True
        )
        return F.linear(out, self.embed.weight)


class Products(TorchDispatchMode):
    """Notes the shapes of all matrix products of a step, forward and backward."""

    names: ClassVar = {"mm": (0, 1), "addmm": (1, 2), "addmm_": (1, 2), "bmm": (0, 1), "baddbmm": (1, 2)}

    def __init__(self) -> None:
        super().__init__()
        self.pairs: list[tuple[Tensor, Tensor]] = []

    def __torch_dispatch__(self, op: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = op.overloadpacket.__name__
        if name in self.names:
            a, b = (args[i] for i in self.names[name])
            self.pairs.append((like(a), like(b)))
        if "scaled_dot_product" in name:
            shift = 1 if "backward" in name else 0
            q, k = args[shift].flatten(0, 1), args[shift + 1].flatten(0, 1)
            scores = torch.ones(q.shape[0], q.shape[1], k.shape[1])
            q, k = torch.ones(q.shape), torch.ones(k.shape)
            forward = [(q, k.mT), (scores, k)]
            backward = [(scores, k), (scores.mT, q), (q, k.mT), (scores, k), (scores.mT, q)]
            self.pairs += backward if shift else forward
        return op(*args, **(kwargs or {}))

    def flops(self) -> float:
        """Return the floating-point operations of all of them."""
        return sum(2.0 * a.numel() * b.shape[-1] for a, b in self.pairs)

    def run(self) -> None:
        """Do the same products and nothing else."""
        for a, b in self.pairs:
            torch.matmul(a, b)


def like(x: Tensor) -> Tensor:
    """Return a tensor of the same shape, strides and dtype."""
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype).fill_(0.5)


class Contender:
    """One of the loops: `step` trains once and returns the real target tokens it has seen."""

    def __init__(self, name: str, step: Callable[[], int]) -> None:
        self.name, self.step = name, step
        self.rates: list[float] = []

    def run(self, steps: int) -> None:
        """Take some steps and note their rate."""
        started = time.perf_counter()
        tokens = sum(self.step() for _ in range(steps))
        self.rates.append(tokens / (time.perf_counter() - started))


def sentences(count: int, vocabulary: int) -> Encoded:
    """Return random pairs whose lengths are those of prose."""
    draw = np.random.default_rng(0)
    sources = np.clip(np.exp(draw.normal(2.9, 0.6, count)), 3, 100).astype(int)
    targets = np.clip(sources * np.exp(draw.normal(0.05, 0.2, count)), 3, 100).astype(int)
    columns = [Column([draw.integers(4, vocabulary, n).tolist() for n in lengths]) for lengths in (sources, targets)]
    return Encoded(columns[0], columns[1], [Pair("", "", "en", "de")] * count, pad_id=0, bos_id=1)


def random_batches(data: Encoded, tokens: int) -> Iterator[Batch]:
    """Yield batches of as many tokens with padding, of pairs as they come: what a usual loop does."""
    draw = np.random.default_rng(1)
    reader = Batches(data, BatchRecipe(tokens=tokens))
    while True:
        order = draw.permutation(len(data))
        start = 0
        while start < len(order):
            count, longest = 0, 0
            while start + count < len(order):
                longest = max(longest, int(data.longer[order[start + count]]))
                if longest * (count + 1) > tokens:
                    break
                count += 1
            yield reader.collate(order[start : start + count])
            start += count


def ours(sizes: argparse.Namespace, batches: Iterator[Batch]) -> Callable[[], int]:
    """Return the step of our loop."""
    config = Transformer2017(
        sizes.vocabulary,
        sizes.vocabulary,
        sizes.width,
        Depth(sizes.layers, sizes.layers),
        AttentionChoice(sizes.heads, dropout=sizes.attention_dropout),
        FeedForwardChoice(4 * sizes.width, dropout=sizes.hidden_dropout),
        NormChoice(final=True),
        dropout=sizes.dropout,
        ties="all",
    )
    model = config.spec().build().train()
    assert isinstance(model, TransformerPart)
    optimiser = AdamW().build(model)
    recipe = TrainRecipe(precision="bf16" if sizes.bf16 else "fp32")

    def step() -> int:
        _, _, tokens = accumulate(model, [next(batches)], recipe)
        clip_gradients(model, 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        return tokens

    return step


def peer(sizes: argparse.Namespace, batches: Iterator[Batch], fused: bool) -> Callable[[], int]:
    """Return the step of a loop around `torch.nn.Transformer`."""
    table = Sinusoidal(sizes.width).build()
    flow = start_flow(torch.zeros(1, 512, dtype=torch.long))
    model = Peer(sizes, table(torch.zeros(1), flow)[0]).train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=fused or None)
    criterion = nn.CrossEntropyLoss(ignore_index=-100, label_smoothing=0.1)

    def step() -> int:
        batch = next(batches)
        with torch.autocast("cpu", torch.bfloat16, enabled=sizes.bf16):
            logits = model(batch.input_ids, ~batch.attention_mask, batch.decoder_input_ids)
            loss = criterion(logits.flatten(0, 1).float(), batch.labels.flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        return batch.target_tokens

    return step


def against_products(sizes: argparse.Namespace, data: Encoded) -> tuple[float, float]:
    """Return how many times as long as its matrix products our step takes, on one batch, and their GFLOP."""
    batch = next(Batches(data, BatchRecipe(tokens=sizes.tokens)))
    step = ours(sizes, itertools.repeat(batch))
    products = Products()
    with products:
        step()
    ratios = []
    for _ in range(3 + sizes.rounds):
        times = []
        for run in (step, products.run):
            started = time.perf_counter()
            for _ in range(sizes.steps):
                run()
            times.append(time.perf_counter() - started)
        ratios.append(times[0] / times[1])
    return statistics.median(ratios[3:]), products.flops() / 1e9


def main() -> None:
    """Run the loops in turn and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=4, help="steps a round")
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--tokens", type=int, default=1024, help="of a batch, padding included")
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--everywhere", action="store_true", help="drop where torch.nn.Transformer does, too")
    parser.add_argument("--bf16", action="store_true", help="autocast for all")
    sizes = parser.parse_args()
    sizes.attention_dropout = sizes.hidden_dropout = sizes.dropout if sizes.everywhere else 0.0
    torch.manual_seed(0)
    data = sentences(4000, sizes.vocabulary)
    identical = Batches(data, BatchRecipe(tokens=sizes.tokens))
    contenders = [
        Contender("ours", ours(sizes, Batches(data, BatchRecipe(tokens=sizes.tokens)))),
        Contender("torch.nn.Transformer, identical batches", peer(sizes, identical, fused=True)),
        Contender("torch.nn.Transformer, the usual loop", peer(sizes, random_batches(data, sizes.tokens), fused=False)),
    ]
    for contender in contenders:
        contender.run(2)
        contender.rates.clear()
    for _ in range(sizes.rounds):
        for contender in contenders:
            contender.run(sizes.steps)
    told: dict[str, float] = {}
    for contender in contenders:
        ratio = statistics.median(a / b for a, b in zip(contenders[0].rates, contender.rates, strict=True))
        rate = statistics.median(contender.rates)
        told |= {contender.name: rate, f"ours / {contender.name}": ratio}
        print(f"{contender.name:42} {rate:8.0f} target tokens/s   ours is {ratio:.2f} x")
    times, work = against_products(sizes, data)
    print(f"our step takes {times:.2f} x the time of its matrix products alone ({work:.0f} GFLOP)")
    if sizes.json:
        sizes.json.write_text(json.dumps({**told, "times_products": times}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
