"""Gemma 2 (Gemma Team 2024): norms on both sides of a sublayer, bounded scores, and windows in every other layer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

from polyformer import parts
from polyformer.families.blocks import Placement
from polyformer.families.config import Head
from polyformer.families.decoder import CAUSAL, heads_of
from polyformer.families.qwen2 import Alternating, LayerType


class Gemma2(Alternating):
    """The keys of a Gemma 2 `config.json`."""

    model_type: ClassVar[str] = "gemma2"
    architectures: ClassVar[dict[str, Head]] = heads_of("Gemma2", "span")
    paper: ClassVar[str] = "Gemma Team 2024"
    tokenizer: ClassVar[str] = "SentencePiece BPE"
    placement: ClassVar[Placement] = "sandwich"
    act: ClassVar[str] = "hidden_activation"
    implied: ClassVar[dict[str, Any]] = {
        "attn_logit_softcapping": 50.0,
        "bos_token_id": 2,
        "eos_token_id": 1,
        "final_logit_softcapping": 30.0,
        "pad_token_id": 0,
    }
    aliases: ClassVar[dict[str, str]] = {"hidden_act": "hidden_activation"}
    unused: ClassVar[dict[str, Any]] = {"cache_implementation": "hybrid", "use_bidirectional_attention": None}

    vocab_size: int = 256000
    hidden_size: int = 2304
    intermediate_size: int = 9216
    num_hidden_layers: int = 26
    num_attention_heads: int = 8
    num_key_value_heads: int = 4
    head_dim: int = 256
    hidden_activation: str = "gelu_pytorch_tanh"
    max_position_embeddings: int = 8192
    attention_bias: bool = False
    query_pre_attn_scalar: int = 256
    sliding_window: int = 4096
    final_logit_softcapping: float | None = None
    attn_logit_softcapping: float | None = None
    tie_word_embeddings: bool = True

    def usual_kinds(self) -> Sequence[LayerType]:
        return ["full_attention" if layer % 2 else "sliding_attention" for layer in range(self.layers)]

    def embed(self) -> parts.Embed:
        return super().embed().replace(scale=math.sqrt(self.width), rounding="model")

    def attention(self, layer: int) -> parts.Attention:
        return parts.Attention.of_heads(self.width, self.heads, CAUSAL, self.attention_bias, self.attention_bias)

    def kernel(self) -> parts.Kernel:
        scale, cap = self.query_pre_attn_scalar**-0.5, self.attn_logit_softcapping
        if cap is None:
            return parts.Softmax(scale, self.attention_dropout)
        return parts.Capped(cap, scale, self.attention_dropout)

    def norm(self) -> parts.Norm:
        return parts.RMSNorm(self.width, self.rms_norm_eps, offset=1.0)

    def language_head(self) -> parts.LMHead:
        return super().language_head().replace(cap=self.final_logit_softcapping)

    def names_in_block(self) -> dict[str, str]:
        return super().names_in_block() | {
            "0.post": "post_attention_layernorm",
            "1.pre": "pre_feedforward_layernorm",
            "1.post": "post_feedforward_layernorm",
        }
