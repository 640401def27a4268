"""ViT (Dosovitskiy et al. 2021) and DeiT (Touvron et al. 2021): BERT's encoder, pre-norm, over patches of an image."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import ClassVar, Self

from torch import Tensor

from polyformer import parts
from polyformer.families.blocks import block, drop
from polyformer.families.config import Family, Head, activation
from polyformer.weights.names import Names, Reshape, Row, rows_below

Sides = int | tuple[int, int]


def pair(sides: Sides) -> tuple[int, int]:
    """Return (height, width) of what a file may give as one number."""
    return (sides, sides) if isinstance(sides, int) else sides


def in_memory(name: str, modules: Mapping[str, str]) -> str:
    """Return a matrix's name with its end as the reference's module has it."""
    name = re.sub(r"(^|\.)encoder\.layer\.", r"\1layers.", name)
    old = next((one for one in modules if name.endswith(f".{one}")), "")
    return name.removesuffix(old) + modules.get(old, "")


class ViT(Family):
    """The keys of a ViT `config.json`; `encoder_stride` belongs to masked image modelling and changes nothing here."""

    model_type: ClassVar[str] = "vit"
    architectures: ClassVar[dict[str, Head]] = {"ViTModel": "none", "ViTForImageClassification": "image"}
    paper: ClassVar[str] = "Dosovitskiy et al. 2021"
    first: ClassVar[tuple[str, ...]] = ("cls_token",)

    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.0
    attention_probs_dropout_prob: float = 0.0
    layer_norm_eps: float = 1e-12
    image_size: Sides = 224
    patch_size: Sides = 16
    num_channels: int = 3
    qkv_bias: bool = True
    encoder_stride: int = 16
    pooler_output_size: int | None = None
    pooler_act: str = "tanh"

    @property
    def width(self) -> int:
        """The width of the rows."""
        return self.hidden_size

    def seeing(self, names: Mapping[str, Tensor]) -> Self:
        return self.replace(pooled="pooler.dense.weight" in names)

    def spec(self) -> parts.Transformer:
        width = self.hidden_size
        norm = parts.LayerNorm(width, self.layer_norm_eps)
        heads = parts.Heads.of_width(width, self.num_attention_heads)
        attention = parts.Attention.of_heads(width, heads, parts.Everyone(), self.qkv_bias, out_bias=True)
        attention = attention.replace(kernel=parts.Softmax(dropout=self.attention_probs_dropout_prob))
        forward = parts.FeedForward.of_widths(width, self.intermediate_size, activation(self.hidden_act))
        one = block(attention, forward, norm=norm, placement="pre", dropout=self.hidden_dropout_prob)
        pooler = (
            parts.Nth(0),
            parts.Linear(width, self.pooler_output_size or width),
            parts.Activate(activation(self.pooler_act)),
        )
        return parts.Transformer(
            source=self._patches(),
            encoder=parts.Stack((one,) * self.num_hidden_layers, norm),
            head=self._head(),
            pooler=parts.Chain(pooler) if self.head == "none" and self.pooled else None,
        )

    def names(self) -> Names:
        below = "" if self.head == "none" else f"{self.model_type}."
        width, patch = self.hidden_size, (self.num_channels, *pair(self.patch_size))
        embeddings, projection = f"{below}embeddings", f"{below}embeddings.patch_embeddings.projection"
        tokens = [
            Row(f"source.tokens.{i}.weight", f"{embeddings}.{name}", Reshape((1, 1, width), (width,)))
            for i, name in enumerate(self.first)
        ]
        rows = [
            *tokens,
            Row("source.positions.weight", f"{embeddings}.position_embeddings", Reshape((1, -1, width), (-1, width))),
            Row("source.project.weight", f"{projection}.weight", Reshape((width, *patch), (width, -1))),
            Row("source.project.bias", f"{projection}.bias"),
            *rows_below("encoder.blocks.{i}.steps", f"{below}encoder.layer.{{i}}", BLOCK),
            Row("encoder.norm.{w}", f"{below}layernorm.{{w}}"),
            Row("pooler.steps.1.{w}", "pooler.dense.{w}"),
            Row("head.steps.1.{w}", "classifier.{w}"),
            Row("head.heads.0.steps.1.{w}", "cls_classifier.{w}"),
            Row("head.heads.1.steps.1.{w}", "distillation_classifier.{w}"),
        ]
        return Names(rows)

    def module(self, name: str) -> str | None:
        return in_memory(name, MODULES)

    def _patches(self) -> parts.Patches:
        (height, width), (down, across) = pair(self.image_size), pair(self.patch_size)
        self.require(0 < down <= height and 0 < across <= width, "an image must have room for a patch")
        project = parts.Linear(self.num_channels * down * across, self.hidden_size)
        tokens = (parts.Token(self.hidden_size),) * len(self.first)
        return parts.Patches(
            (down, across),
            self.num_channels,
            project,
            tokens,
            parts.GridPositions(self.hidden_size, (height // down, width // across), before=len(tokens)),
            dropout=drop(self.hidden_dropout_prob),
            edge="crop" if height % down or width % across else "refuse",
        )

    def _head(self) -> parts.Chain | parts.MeanOfHeads | None:
        if self.head == "none":
            return None
        first, *others = (
            parts.Chain((parts.Nth(i), parts.Linear(self.hidden_size, len(self.labels)))) for i in range(2)
        )
        return parts.MeanOfHeads((first, *others)) if self.architecture.endswith("WithTeacher") else first


class DeiT(ViT):
    """The keys of a DeiT `config.json`: a ViT with a distillation token, and perhaps a head for it."""

    model_type: ClassVar[str] = "deit"
    architectures: ClassVar[dict[str, Head]] = {
        "DeiTModel": "none",
        "DeiTForImageClassification": "image",
        "DeiTForImageClassificationWithTeacher": "image",
    }
    paper: ClassVar[str] = "Touvron et al. 2021"
    first: ClassVar[tuple[str, ...]] = ("cls_token", "distillation_token")


BLOCK = {
    "0.op.q": "attention.attention.query",
    "0.op.k": "attention.attention.key",
    "0.op.v": "attention.attention.value",
    "0.op.o": "attention.output.dense",
    "0.pre": "layernorm_before",
    "1.op.up": "intermediate.dense",
    "1.op.down": "output.dense",
    "1.pre": "layernorm_after",
}

MODULES = {
    "attention.attention.query": "attention.q_proj",
    "attention.attention.key": "attention.k_proj",
    "attention.attention.value": "attention.v_proj",
    "attention.output.dense": "attention.o_proj",
    "intermediate.dense": "mlp.fc1",
    "output.dense": "mlp.fc2",
}
"""What the reference's modules are called in memory, where files keep older names."""
