"""Qwen3 (Yang et al. 2025): Qwen2 without its biases, and with a norm on each head's queries and keys."""

from __future__ import annotations

from typing import Any, ClassVar

from polyformer import parts
from polyformer.families.config import Head
from polyformer.families.decoder import CAUSAL, heads_of
from polyformer.families.qwen2 import Qwen2


class Qwen3(Qwen2):
    """The keys of a Qwen3 `config.json`."""

    model_type: ClassVar[str] = "qwen3"
    architectures: ClassVar[dict[str, Head]] = heads_of("Qwen3")
    paper: ClassVar[str] = "Yang et al. 2025"
    tokenizer: ClassVar[str] = "byte-level BPE"
    implied: ClassVar[dict[str, Any]] = {**Qwen2.implied, "head_dim": 128}

    attention_bias: bool = False

    def attention(self, layer: int) -> parts.Attention:
        plain = parts.Attention.of_heads(self.width, self.heads, CAUSAL, self.attention_bias, self.attention_bias)
        norm = parts.PerHead(parts.RMSNorm(self.heads.width, self.rms_norm_eps))
        return plain.replace(q=parts.Chain((plain.q, norm)), k=parts.Chain((plain.k, norm)))

    def names_in_block(self) -> dict[str, str]:
        names = super().names_in_block()
        for one in "qk":
            del names[f"0.op.{one}"]
            names[f"0.op.{one}.steps.0"] = f"self_attn.{one}_proj"
            names[f"0.op.{one}.steps.1.norm"] = f"self_attn.{one}_norm"
        return names
