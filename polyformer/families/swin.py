"""Swin (Liu et al. 2021): attention within shifted windows, over a pyramid of ever wider and fewer rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from polyformer import parts
from polyformer.errors import SpecError
from polyformer.families.blocks import drop
from polyformer.families.config import Family, Head, activation
from polyformer.families.vit import Sides, in_memory, pair
from polyformer.parts.windows import Offsets, flow_within
from polyformer.weights.names import Names, Reshape, Row, rows_below


class Swin(Family):
    """The keys of a Swin `config.json`; `encoder_stride` belongs to masked image modelling and changes nothing here."""

    model_type: ClassVar[str] = "swin"
    architectures: ClassVar[dict[str, Head]] = {"SwinModel": "none", "SwinForImageClassification": "image"}
    paper: ClassVar[str] = "Liu et al. 2021"
    unused: ClassVar[dict[str, Any]] = {"path_norm": True}

    image_size: Sides = 224
    patch_size: Sides = 4
    num_channels: int = 3
    embed_dim: int = 96
    depths: tuple[int, ...] = (2, 2, 6, 2)
    num_heads: tuple[int, ...] = (3, 6, 12, 24)
    window_size: int = 7
    mlp_ratio: float = 4.0
    qkv_bias: bool = True
    hidden_dropout_prob: float = 0.0
    attention_probs_dropout_prob: float = 0.0
    drop_path_rate: float = 0.1
    hidden_act: str = "gelu"
    use_absolute_embeddings: bool = False
    layer_norm_eps: float = 1e-5
    encoder_stride: int = 32

    @classmethod
    def modern(cls, data: Mapping[str, Any], where: str) -> Mapping[str, Any]:
        """Leave out what follows from other keys, or is for detectors only; what should follow must agree."""
        depths, width = data.get("depths", cls.depths), data.get("embed_dim", cls.embed_dim)
        if isinstance(depths, (list, tuple)) and 0 < len(depths) <= 16 and isinstance(width, int):
            last = width * 2 ** (len(depths) - 1)
            known = {"num_layers": len(depths), "num_hidden_layers": len(depths), "hidden_size": last}
            for key, follows in known.items():
                if data.get(key, follows) != follows:
                    raise SpecError(f"{where} has {key} = {data[key]!r}, but depths and embed_dim make it {follows}")
        said = ("num_layers", "num_hidden_layers", "hidden_size", "stage_names", "out_features", "out_indices")
        return {key: value for key, value in data.items() if key not in said}

    def check(self) -> None:
        super().check()
        self.require(0 < len(self.depths) <= 16, "depths should name 1 to 16 stages")
        self.require(len(self.num_heads) == len(self.depths), "num_heads and depths differ in length")
        self.require(all(0 < depth <= 1024 for depth in self.depths), "a stage should have 1 to 1024 blocks")
        self.require(0 < self.window_size <= 1024, f"window_size = {self.window_size} is not between 1 and 1024")

    @property
    def width(self) -> int:
        """The width of the last stage's rows."""
        return self.embed_dim << (len(self.depths) - 1)

    def spec(self) -> parts.Transformer:
        (height, width), (down, across) = pair(self.image_size), pair(self.patch_size)
        self.require(0 < down <= height and 0 < across <= width, "an image must have room for a patch")
        grid = parts.GridPositions(self.embed_dim, (height // down, width // across))
        source = parts.Patches(
            (down, across),
            self.num_channels,
            parts.Linear(self.num_channels * down * across, self.embed_dim),
            positions=grid if self.use_absolute_embeddings else None,
            norm=parts.LayerNorm(self.embed_dim),
            dropout=drop(self.hidden_dropout_prob),
            edge="pad",
        )
        widths = [self.embed_dim * 2**i for i in range(len(self.depths))]
        head = parts.Chain((parts.Mean(), parts.Linear(self.width, len(self.labels))))
        return parts.Transformer(
            source=source,
            encoder=parts.Pyramid(
                tuple(self._stage(i, width) for i, width in enumerate(widths)),
                tuple(parts.PatchMerging.of_width(width) for width in widths[:-1]),
                parts.LayerNorm(self.width, self.layer_norm_eps),
            ),
            head=None if self.head == "none" else head,
            pooler=parts.Mean() if self.head == "none" else None,
        )

    def names(self) -> Names:
        below = "" if self.head == "none" else "swin."
        patch, positions = (self.num_channels, *pair(self.patch_size)), f"{below}embeddings.position_embeddings"
        projection, layer = f"{below}embeddings.patch_embeddings.projection", f"{below}encoder.layers.{{i}}"
        width, table = self.embed_dim, f"{layer}.blocks.{{j}}.attention.self.relative_position"
        rows = [
            Row("source.positions.weight", positions, Reshape((1, -1, width), (-1, width))),
            Row("source.project.weight", f"{projection}.weight", Reshape((width, *patch), (width, -1))),
            Row("source.project.bias", f"{projection}.bias"),
            Row("source.norm.{w}", f"{below}embeddings.norm.{{w}}"),
            *rows_below("encoder.stages.{i}.blocks.{j}.steps", f"{layer}.blocks.{{j}}", BLOCK),
            Row("encoder.stages.{i}.blocks.{j}.steps.0.op.op.position.weight", f"{table}_bias_table"),
            Row("encoder.merges.{i}.norm.{w}", f"{layer}.downsample.norm.{{w}}"),
            Row("encoder.merges.{i}.project.weight", f"{layer}.downsample.reduction.weight"),
            Row("encoder.norm.{w}", f"{below}layernorm.{{w}}"),
            Row("head.steps.1.{w}", "classifier.{w}"),
        ]
        return Names(rows, computed={f"{table}_index": self._is_index})

    def module(self, name: str) -> str | None:
        return in_memory(name, MODULES)

    def _stage(self, i: int, width: int) -> parts.Stack:
        before, total = sum(self.depths[:i]), sum(self.depths)
        rates = [self.drop_path_rate * (before + j) / max(total - 1, 1) for j in range(self.depths[i])]
        return parts.Stack(tuple(self._block(i, width, j % 2 == 1, rate) for j, rate in enumerate(rates)))

    def _block(self, i: int, width: int, shifted: bool, rate: float) -> parts.Chain:
        norm = parts.LayerNorm(width, self.layer_norm_eps)
        heads = parts.Heads.of_width(width, self.num_heads[i])
        attention = parts.Attention.of_heads(width, heads, parts.SameDocument(), self.qkv_bias, out_bias=True)
        attention = attention.replace(
            kernel=parts.Softmax(dropout=self.attention_probs_dropout_prob),
            position=parts.GridBias(heads.count, self.window_size, self.window_size),
        )
        windowed = parts.Windows(attention, self.window_size, self.window_size // 2 if shifted else 0)
        forward = parts.FeedForward.of_widths(width, int(self.mlp_ratio * width), activation(self.hidden_act))
        dropped = drop(self.hidden_dropout_prob)
        steps = [step for step in (dropped, parts.DropPath(rate) if rate else None) if step is not None]
        return parts.Chain(
            (
                parts.Residual(windowed, pre=norm, post=parts.Chain(tuple(steps)) if steps else None),
                parts.Residual(forward, pre=norm, post=dropped),
            )
        )

    def _is_index(self, table: Tensor) -> bool:
        """Older files hold which offset each pair of rows has; it must be the one that we compute."""
        side = self.window_size
        flow = flow_within((1, side, side), side, 0, table)
        expected = Offsets(flow.view, flow.grid, (side - 1, side - 1)).all()[0, 0]
        return table.shape == expected.shape and bool((table == expected).all())


BLOCK = {
    "0.op.op.q": "attention.self.query",
    "0.op.op.k": "attention.self.key",
    "0.op.op.v": "attention.self.value",
    "0.op.op.o": "attention.output.dense",
    "0.pre": "layernorm_before",
    "1.op.up": "intermediate.dense",
    "1.op.down": "output.dense",
    "1.pre": "layernorm_after",
}

MODULES = {
    "attention.self.query": "attention.q_proj",
    "attention.self.key": "attention.k_proj",
    "attention.self.value": "attention.v_proj",
    "attention.output.dense": "attention.o_proj",
    "intermediate.dense": "mlp.fc1",
    "output.dense": "mlp.fc2",
}
"""What the reference's modules are called in memory, where files keep older names."""
