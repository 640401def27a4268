"""Wav2Vec2-Conformer (Wang et al. 2020): wav2vec 2.0's convolutions over a waveform, under Conformer's blocks.

Baevski et al. 2020 for the former, Gulati et al. 2020 for the latter.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from polyformer import parts
from polyformer.errors import SpecError
from polyformer.families.blocks import drop
from polyformer.families.config import Family, Head, activation
from polyformer.spec import Spec
from polyformer.weights.names import Names, Reshape, Row, rows_below


class Wav2Vec2Conformer(Family):
    """The keys of a Wav2Vec2-Conformer `config.json`; those of `pretraining` change nothing after it."""

    model_type: ClassVar[str] = "wav2vec2-conformer"
    architectures: ClassVar[dict[str, Head]] = {"Wav2Vec2ConformerModel": "none", "Wav2Vec2ConformerForCTC": "ctc"}
    paper: ClassVar[str] = "Wang et al. 2020"
    tokenizer: ClassVar[str] = "characters"
    pretraining: ClassVar[tuple[str, ...]] = (
        "codevector_dim",
        "contrastive_logits_temperature",
        "diversity_loss_weight",
        "feat_quantizer_dropout",
        "num_codevector_groups",
        "num_codevectors_per_group",
        "num_negatives",
        "proj_codevector_dim",
    )
    unused: ClassVar[dict[str, Any]] = {
        "adapter_kernel_size": 3,
        "adapter_stride": 2,
        "add_adapter": False,
        "classifier_proj_size": 256,
        "num_adapter_layers": 3,
        "tdnn_dilation": [1, 2, 3, 1, 1],
        "tdnn_dim": [512, 512, 512, 512, 1500],
        "tdnn_kernel": [5, 3, 3, 1, 1],
        "use_weighted_layer_sum": False,
        "xvector_output_dim": 512,
    }
    vocab_size: int | None = None
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout: float = 0.1
    activation_dropout: float = 0.1
    attention_dropout: float = 0.1
    feat_proj_dropout: float = 0.0
    final_dropout: float = 0.1
    conformer_conv_dropout: float = 0.1
    layerdrop: float = 0.1
    layer_norm_eps: float = 1e-5
    feat_extract_norm: Literal["group", "layer"] = "group"
    feat_extract_activation: str = "gelu"
    conv_dim: tuple[int, ...] = (512,) * 7
    conv_stride: tuple[int, ...] = (5, 2, 2, 2, 2, 2, 2)
    conv_kernel: tuple[int, ...] = (10, 3, 3, 3, 3, 2, 2)
    conv_bias: bool = False
    num_conv_pos_embeddings: int = 128
    num_conv_pos_embedding_groups: int = 16
    apply_spec_augment: bool = True
    mask_time_prob: float = 0.05
    mask_time_length: int = 10
    mask_time_min_masks: int = 2
    mask_feature_prob: float = 0.0
    mask_feature_length: int = 10
    mask_feature_min_masks: int = 0
    position_embeddings_type: Literal["relative", "rotary"] | None = None
    rotary_embedding_base: int = 10000
    max_source_positions: int = 5000
    conv_depthwise_kernel_size: int = 31
    ctc_loss_reduction: str = "sum"
    ctc_zero_infinity: bool = False
    pad_token_id: int = 0
    bos_token_id: int = 1
    eos_token_id: int | tuple[int, ...] = 2

    @classmethod
    def modern(cls, data: Mapping[str, Any], where: str) -> Mapping[str, Any]:
        """Leave out what follows from other keys, which must agree, and what pretraining alone asks for."""
        layers, width = data.get("conv_dim", cls.conv_dim), data.get("hidden_size", cls.hidden_size)
        known = {"num_feat_extract_layers": len(layers) if isinstance(layers, (list, tuple)) else 0}
        known["output_hidden_size"] = width
        for key, follows in known.items():
            if data.get(key) not in (None, follows):
                raise SpecError(f"{where} has {key} = {data[key]!r}; only {follows!r} goes with the other keys")
        kept = {key: value for key, value in data.items() if key not in (*known, *cls.pretraining)}
        return {"position_embeddings_type": "relative", **kept}

    def check(self) -> None:
        super().check()
        layers = (self.conv_dim, self.conv_stride, self.conv_kernel)
        same = len({len(one) for one in layers}) == 1 and 0 < len(self.conv_dim) <= 32
        self.require(same, "conv_dim, conv_stride and conv_kernel should name the same 1 to 32 layers")
        sizes = [size for one in layers for size in one]
        self.require(all(0 < size <= 2**16 for size in sizes), "convolutions should have sizes from 1 to 65536")
        worded = self.head != "ctc" or self.vocab_size is not None
        self.require(worded, "a model for CTC needs a vocab_size")

    def spec(self) -> parts.Transformer:
        head: list[Spec] = [parts.Dropout(self.final_dropout)] if self.final_dropout else []
        head.append(parts.Linear(self.hidden_size, self.vocab_size or 1))
        norm = parts.LayerNorm(self.hidden_size, self.layer_norm_eps)
        return parts.Transformer(
            source=parts.Frames(parts.Chain(tuple(self._stem())), dropout=drop(self.hidden_dropout)),
            encoder=parts.Stack((self._block(),) * self.num_hidden_layers, norm, self.layerdrop),
            head=parts.Chain(tuple(head)) if self.head == "ctc" else None,
        )

    def names(self) -> Names:
        below = "" if self.head == "none" else "wav2vec2_conformer."
        width, layer = self.hidden_size, f"{below}encoder.layers.{{i}}"
        ours, conv, gated = "encoder.blocks.{i}.steps", f"{below}feature_extractor.conv_layers.{{i}}", "2.op.norm.steps"
        idle, disk = "source.stem.steps.3.tensor_", f"{below}encoder.pos_conv_embed.conv"
        norms = (
            ("weight", "weight"),
            ("bias", "bias"),
            ("running_mean", "running_mean"),
            ("running_variance", "running_var"),
        )
        turned = ".steps.1" if self.position_embeddings_type == "rotary" else ""
        rows = [
            Row("source.stem.steps.0.steps.{i}.steps.0.{w}", f"{conv}.conv.{{w}}"),
            Row("source.stem.steps.0.steps.{i}.steps.1.{w}", f"{conv}.layer_norm.{{w}}"),
            Row("source.stem.steps.1.{w}", f"{below}feature_projection.layer_norm.{{w}}"),
            Row("source.stem.steps.2.{w}", f"{below}feature_projection.projection.{{w}}"),
            Row(f"source.stem.steps.{4 + bool(self.feat_proj_dropout)}.weight", f"{below}masked_spec_embed"),
            Row(f"{idle}0", f"{disk}.parametrizations.weight.original0"),
            Row(f"{idle}1", f"{disk}.parametrizations.weight.original1"),
            Row(f"{idle}2", f"{disk}.bias"),
            Row(f"{idle}0", f"{disk}.weight_g"),  # as older files call it
            Row(f"{idle}1", f"{disk}.weight_v"),
            *rows_below(ours, layer, BLOCK),
            *rows_below(ours, layer, {f"1.op.{one}{turned}": f"self_attn.linear_{one}" for one in "qk"}),
            Row(f"{ours}.1.op.position.content", f"{layer}.self_attn.pos_bias_u"),
            Row(f"{ours}.1.op.position.distance", f"{layer}.self_attn.pos_bias_v"),
            *(Row(f"{ours}.{gated}.0.{mine}", f"{layer}.conv_module.batch_norm.{theirs}") for mine, theirs in norms),
            Row(f"{ours}.{gated}.1.tensor_0", f"{layer}.conv_module.batch_norm.num_batches_tracked"),
            *(
                Row(
                    f"{ours}.2.op.{mine}.weight",
                    f"{layer}.conv_module.pointwise_conv{theirs}.weight",
                    Reshape((-1, width, 1), (-1, width)),
                )
                for mine, theirs in (("up", 1), ("down", 2))
            ),
            Row("encoder.norm.{w}", f"{below}encoder.layer_norm.{{w}}"),
            Row(f"head.steps.{int(bool(self.final_dropout))}.{{w}}", "lm_head.{w}"),
        ]
        if not turned:
            return Names(rows)
        rates = f"{below}encoder.embed_positions.inv_freq"
        return Names(rows, {rates: self._are_rates}, {rates: self._rotary().plain})

    def _stem(self) -> list[Spec]:
        """Return what makes rows of a waveform; the positional convolution of wav2vec 2.0 is held, but not used."""
        width, last = self.hidden_size, self.conv_dim[-1]
        layers = []
        sizes = zip((1, *self.conv_dim), self.conv_dim, self.conv_kernel, self.conv_stride, strict=False)
        for i, (inputs, outputs, kernel, stride) in enumerate(sizes):
            steps: list[Spec] = [parts.Convolution(inputs, outputs, kernel, stride, bias=self.conv_bias)]
            if self.feat_extract_norm == "layer":
                steps.append(parts.LayerNorm(outputs))
            elif i == 0:
                steps.append(parts.ChannelNorm(outputs))
            layers.append(parts.Chain((*steps, parts.Activate(activation(self.feat_extract_activation)))))
        kernel, groups = self.num_conv_pos_embeddings, self.num_conv_pos_embedding_groups
        self.require(kernel > 0 and groups > 0 and width % groups == 0, "the positional convolution has no such groups")
        idle = parts.Idle(((1, 1, kernel), (width, width // groups, kernel), (width,)))
        norm = parts.LayerNorm(last, self.layer_norm_eps)
        steps = [parts.Chain(tuple(layers)), norm, parts.Linear(last, width), idle]
        steps += [parts.Dropout(self.feat_proj_dropout)] if self.feat_proj_dropout else []
        if self.mask_time_prob > 0 or self.mask_feature_prob > 0:
            heeded = int(self.apply_spec_augment)
            spans = (self.mask_time_prob * heeded, self.mask_time_length, self.mask_time_min_masks)
            channels = (self.mask_feature_prob * heeded, self.mask_feature_length, self.mask_feature_min_masks)
            steps.append(parts.MaskedSpans(width, *spans, *channels))
        return steps

    def _block(self) -> parts.Chain:
        width, act = self.hidden_size, activation(self.hidden_act)
        norm = parts.LayerNorm(width)
        halved: list[Spec] = [parts.Dropout(self.hidden_dropout)] if self.hidden_dropout else []
        halved.append(parts.Scale(0.5))
        forward = parts.FeedForward.of_widths(width, self.intermediate_size, act)
        forward = forward.replace(dropout=drop(self.activation_dropout))
        gated = parts.GatedConvolution.of_width(width, self.conv_depthwise_kernel_size, act)
        gated = gated.replace(
            norm=parts.Chain((gated.norm, parts.Idle(((),), "counts"))), dropout=drop(self.conformer_conv_dropout)
        )
        half = parts.Residual(forward, pre=norm, post=parts.Chain(tuple(halved)))
        steps = (
            half,
            parts.Residual(self._attention(), pre=norm, post=drop(self.attention_dropout)),
            parts.Residual(gated, pre=norm),
            half.replace(after=norm),
        )
        return parts.Chain(steps)

    def _attention(self) -> parts.Attention:
        width, heads = self.hidden_size, self.num_attention_heads
        made = parts.Attention.of_width(width, heads, parts.Everyone())
        made = made.replace(kernel=parts.Softmax(dropout=self.attention_dropout))
        if self.position_embeddings_type == "rotary":
            turned = parts.Chain((parts.Turned(self._rotary(), heads), made.q))
            return made.replace(q=turned, k=turned)
        relative = self.position_embeddings_type == "relative"
        return made.replace(position=parts.TransformerXL.of_width(width, heads)) if relative else made

    def _rotary(self) -> parts.Rotary:
        return parts.Rotary(self.hidden_size // self.num_attention_heads, float(self.rotary_embedding_base))

    def _are_rates(self, table: Tensor) -> bool:
        """The file holds how fast each pair turns, which follows from the base."""
        expected = self._rotary().plain()
        tolerance = max(1e-6, torch.finfo(table.dtype).eps) if table.is_floating_point() else 0.0
        return table.shape == expected.shape and torch.allclose(table.float(), expected, rtol=tolerance, atol=0)


BLOCK = {
    "0.pre": "ffn1_layer_norm",
    "0.op.up": "ffn1.intermediate_dense",
    "0.op.down": "ffn1.output_dense",
    "1.pre": "self_attn_layer_norm",
    "1.op.v": "self_attn.linear_v",
    "1.op.o": "self_attn.linear_out",
    "1.op.position.project": "self_attn.linear_pos",
    "2.pre": "conv_module.layer_norm",
    "2.op.depthwise": "conv_module.depthwise_conv",
    "3.pre": "ffn2_layer_norm",
    "3.op.up": "ffn2.intermediate_dense",
    "3.op.down": "ffn2.output_dense",
    "3.after": "final_layer_norm",
}
