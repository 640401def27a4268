"""Models whose parts are swapped, and what must hold of every transplant."""

from __future__ import annotations

import torch
from torch import Tensor

from polyformer.parts import (
    Attention,
    Buckets,
    Causal,
    Chain,
    Dropout,
    Embed,
    Everyone,
    FeedForward,
    Heads,
    LayerNorm,
    Learned,
    Linear,
    LMHead,
    Residual,
    RMSNorm,
    SameDocument,
    Stack,
    Tie,
    TokenEmbedding,
    Transformer,
)
from polyformer.parts.model import TransformerPart
from polyformer.swap import Report, transplant
from tests.parts.models import build

WIDTH, VOCABULARY, LENGTH = 16, 23, 32


def gpt(layers: int = 4, heads: int = 4, tied: bool = True) -> Transformer:
    """GPT-2's layout: learned positions, pre-norm, one matrix for embedding and head."""
    attention = Attention.of_width(WIDTH, heads, Causal() & SameDocument())
    sublayers = attention, FeedForward.of_widths(WIDTH, 40, "gelu_tanh")
    block = Chain(tuple(Residual(op, LayerNorm(WIDTH), Dropout(0.1)) for op in sublayers))
    return Transformer(
        target=Embed(TokenEmbedding(VOCABULARY, WIDTH), Learned(WIDTH, LENGTH)),
        decoder=Stack((block,) * layers, LayerNorm(WIDTH)),
        head=LMHead.of_width(WIDTH, VOCABULARY),
        ties=(Tie("head.projection.weight", "target.tokens.weight"),) * tied,
    )


def t5(layers: int = 3) -> Transformer:
    """An encoder whose layers share the first one's table of buckets."""
    attention = Attention.of_width(WIDTH, 4, Everyone(), bias=False).replace(position=Buckets(4, 8, 20))
    block = Chain((Residual(attention, RMSNorm(WIDTH)), Residual(FeedForward.gated(WIDTH, 20), RMSNorm(WIDTH))))
    table = "encoder.blocks.{}.steps.0.op.position.weight"
    return Transformer(
        source=Embed(TokenEmbedding(VOCABULARY, WIDTH)),
        encoder=Stack((block,) * layers, RMSNorm(WIDTH)),
        ties=tuple(Tie(table.format(i), table.format(0)) for i in range(1, layers)),
    )


def olmo() -> Transformer:
    """Keys and queries have a norm over all heads, and norms stand behind the sublayers."""
    heads = Heads(4, 4, 4)
    normed = Chain((Linear(WIDTH, WIDTH, False), RMSNorm(WIDTH)))
    plain = Linear(WIDTH, WIDTH, False)
    attention = Attention(normed, normed, plain, plain, heads, Causal())
    block = Chain((Residual(attention, post=RMSNorm(WIDTH)),))
    return Transformer(
        target=Embed(TokenEmbedding(VOCABULARY, WIDTH)),
        decoder=Stack((block,) * 2, RMSNorm(WIDTH)),
        head=LMHead.of_width(WIDTH, VOCABULARY),
    )


def made(spec: Transformer) -> TransformerPart:
    """Build with weights for which everything matters."""
    return build(spec)


def ids(rows: int = 3, length: int = 9) -> Tensor:
    return torch.randint(VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(5))


def moved(model: TransformerPart, *arguments: object) -> tuple[TransformerPart, Report]:
    """Transplant, and check what holds of every report."""
    kept = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    new, report = transplant(model, *arguments)  # type: ignore[arg-type]
    assert_adds_up(model, new, report)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, kept[name]), f"{name} was changed in the old model"
    return new, report


def assert_adds_up(old: TransformerPart, new: TransformerPart, report: Report) -> None:
    """Each new tensor has one fate, each old one is used or left out, and the fates are what happened."""
    before, after = old.state_dict(), new.state_dict()
    assert sorted(name for entry in report.tensors for name in entry.names) == sorted(after)
    tied = {name: names for names in _distinct(old) for name in names}
    used = {name for entry in report.tensors if entry.source is not None for name in tied[entry.source]}
    left = [name for entry in report.left_out for name in entry.names]
    assert sorted((*used, *left)) == sorted(before)
    for entry in report.tensors:
        tensor = after[entry.names[0]]
        assert entry.shape == tuple(tensor.shape)
        assert (entry.source is None) == (entry.fate == "new" or "sinusoids" in entry.note)
        if entry.fate == "kept":
            assert torch.equal(tensor, before[entry.names[0]])
            assert entry.source in entry.names
        if entry.fate == "mapped" and not entry.note:
            assert torch.equal(tensor, before[entry.source])
            assert entry.source not in entry.names
        shared = {other.untyped_storage().data_ptr() for other in before.values()}
        assert tensor.untyped_storage().data_ptr() not in shared
    values = sum(parameter.numel() for parameter in {id(p): p for p in (*new.parameters(), *new.buffers())}.values())
    counted = report.summary
    assert sum(n for fate, (_, n) in counted.items() if fate != "left out") == values
    assert sum(n for n, _ in counted.values()) == len(report.tensors) + len(report.left_out)


def _distinct(model: TransformerPart) -> list[tuple[str, ...]]:
    found: dict[int, list[str]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        found.setdefault(id(tensor), []).append(name)
    return [tuple(names) for names in found.values()]


def fates(report: Report) -> dict[str, str]:
    """Return the fate of each tensor of the new model by its first name."""
    return {entry.names[0]: entry.fate for entry in report.tensors}


def left_out(report: Report) -> list[str]:
    """Return the names of the old tensors that were used for nothing."""
    return [name for entry in report.left_out for name in entry.names]
