"""Qwen2-MoE (Yang et al. 2024) and Qwen3-MoE (Yang et al. 2025): Qwen2 and Qwen3 with experts in some or all layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from polyformer import parts
from polyformer.families.config import Head, activation
from polyformer.families.decoder import CAUSAL, heads_of
from polyformer.families.mixtral import check_experts, expert_rows, routed_module, router_losses, stacked_rows
from polyformer.families.qwen2 import LayerType, Qwen2
from polyformer.families.qwen3 import Qwen3
from polyformer.spec import Spec
from polyformer.weights.names import Row, rows_below


class SparseQwen(Qwen2, abstract=True):
    """Experts in every `decoder_sparse_step`-th layer but those of `mlp_only_layers`."""

    inside: ClassVar[str] = "decoder.blocks.{i}.steps.1.op"

    decoder_sparse_step: int = 1
    moe_intermediate_size: int = 768
    num_experts_per_tok: int = 8
    num_experts: int = 128
    norm_topk_prob: bool = False
    output_router_logits: bool = False
    router_aux_loss_coef: float = 0.001
    mlp_only_layers: tuple[int, ...] | None = None

    def check(self) -> None:
        super().check()
        self.require(self.decoder_sparse_step > 0, "decoder_sparse_step must be at least 1")
        check_experts(self, self.num_experts)

    def feed_forward(self, layer: int) -> Spec:
        dense = layer in (self.mlp_only_layers or ()) or (layer + 1) % self.decoder_sparse_step
        return super().feed_forward(layer) if dense else self.experts()

    def experts(self) -> Spec:
        """Return what stands in the place of a feed-forward network."""
        expert = self.gated(self.moe_intermediate_size)
        made = parts.Experts.of(expert, self.width, self.num_experts, self.num_experts_per_tok)
        return made.replace(
            weights="chosen" if self.norm_topk_prob else "all", losses=router_losses(self.router_aux_loss_coef)
        )

    def gated(self, hidden: int) -> parts.FeedForward:
        """Return one network."""
        return parts.FeedForward.gated(self.width, hidden, activation(getattr(self, self.act)))

    def module(self, name: str) -> str | None:
        return routed_module(name)

    def rows(self, base: str) -> list[Row]:
        disk, sizes = f"{base}layers.{{i}}.mlp", (self.width, self.moe_intermediate_size)
        names = {one: f"{one}_proj" for one in ("gate", "up", "down")}
        return [
            *super().rows(base),
            Row(f"{self.inside}.router.{{w}}", f"{disk}.gate.{{w}}"),
            *expert_rows(f"{self.inside}.experts", f"{disk}.experts", names),
            *stacked_rows(f"{self.inside}.experts", f"{disk}.experts", self.num_experts, sizes),
        ]


class Qwen2Moe(SparseQwen):
    """The keys of a Qwen2-MoE `config.json`."""

    model_type: ClassVar[str] = "qwen2_moe"
    architectures: ClassVar[dict[str, Head]] = heads_of("Qwen2Moe")
    paper: ClassVar[str] = "Yang et al. 2024"
    tokenizer: ClassVar[str] = "byte-level BPE"
    span_base: ClassVar[str] = ""
    implied: ClassVar[dict[str, Any]] = {"num_key_value_heads": 16, "sliding_window": 4096}
    inside: ClassVar[str] = "decoder.blocks.{i}.steps.1.op.steps.0"

    hidden_size: int = 2048
    intermediate_size: int = 5632
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    moe_intermediate_size: int = 1408
    shared_expert_intermediate_size: int = 5632
    num_experts_per_tok: int = 4
    num_experts: int = 60
    qkv_bias: bool = True

    def usual_kinds(self) -> Sequence[LayerType]:
        windowed = min(self.max_window_layers, self.layers) if self.use_sliding_window else 0
        return ["sliding_attention" if i < windowed and i % 2 == 0 else "full_attention" for i in range(self.layers)]

    def attention(self, layer: int) -> parts.Attention:
        return parts.Attention.of_heads(self.width, self.heads, CAUSAL, self.qkv_bias)

    def experts(self) -> Spec:
        shared = self.gated(self.shared_expert_intermediate_size)
        return parts.Branches((super().experts(), parts.Gated(shared, parts.Linear(self.width, 1, bias=False))))

    def rows(self, base: str) -> list[Row]:
        names = {f"op.{one}": f"shared_expert.{one}_proj" for one in ("gate", "up", "down")}
        names["gate"] = "shared_expert_gate"
        shared = rows_below("decoder.blocks.{i}.steps.1.op.steps.1", f"{base}layers.{{i}}.mlp", names)
        return [*super().rows(base), *shared]


class Qwen3Moe(SparseQwen, Qwen3):
    """The keys of a Qwen3-MoE `config.json`."""

    model_type: ClassVar[str] = "qwen3_moe"
    architectures: ClassVar[dict[str, Head]] = heads_of("Qwen3Moe")
    paper: ClassVar[str] = "Yang et al. 2025"
    tokenizer: ClassVar[str] = "byte-level BPE"
    implied: ClassVar[dict[str, Any]] = {"sliding_window": 4096}
    aliases: ClassVar[dict[str, str]] = {"num_local_experts": "num_experts"}

    hidden_size: int = 2048
    intermediate_size: int = 6144
    num_hidden_layers: int = 24
    num_key_value_heads: int = 4

    def usual_kinds(self) -> Sequence[LayerType]:
        windowed = self.use_sliding_window and self.sliding_window
        return ["sliding_attention" if windowed else "full_attention"] * self.layers
