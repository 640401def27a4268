"""Training speed, in real target tokens per second, beside `torch.nn.Transformer` of the same sizes.

    python benchmarks/training.py [--json FILE] [--rounds 5] [--width 256] [--dropout 0.1] [--bf16]

Four loops are run in turn, step by step, in one process, so that the machine's moods reach all of them alike:

- ours: length-bucketed batches, fused dropout masks, the loss in chunks, fused AdamW;
- peer, the same batches: `torch.nn.Transformer`, full logits, fused AdamW;
- peer, the usual loop: random batches of as many tokens with padding, full logits, AdamW as it comes;
- floor: only the matrix products of our step, of the same shapes in the same order.

Sentence lengths are drawn from a log-normal distribution (median 18, mean about 22 tokens), tokens at random: speed
does not depend on what they say.
"""

from __future__ import annotations

import argparse
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode


class Peer(nn.Module):
    """`torch.nn.Transformer` with shared embeddings and sinusoidal positions: what its users write around it."""

    def __init__(self, vocabulary: int, sizes: argparse.Namespace, positions: Tensor) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, sizes.width)
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
