"""OLMo 2 (OLMo Team 2024): norms behind the sublayers instead of before them, and on all queries and keys."""

from __future__ import annotations

from typing import Any, ClassVar

from polyformer import parts
from polyformer.families.blocks import Placement
from polyformer.families.config import Head
from polyformer.families.decoder import CAUSAL, heads_of
from polyformer.families.llama import LlamaLike


class Olmo2(LlamaLike):
    """The keys of an OLMo 2 `config.json`."""

    model_type: ClassVar[str] = "olmo2"
    architectures: ClassVar[dict[str, Head]] = heads_of("Olmo2", "token", "span")
    paper: ClassVar[str] = "OLMo Team 2024"
    tokenizer: ClassVar[str] = "byte-level BPE"
    placement: ClassVar[Placement] = "output"
    implied: ClassVar[dict[str, Any]] = {"eos_token_id": 50279, "pad_token_id": 1}

    vocab_size: int = 50304
    hidden_act: str = "silu"
    rms_norm_eps: float = 1e-5
    attention_bias: bool = False

    def attention(self, layer: int) -> parts.Attention:
        heads = self.heads
        plain = parts.Attention.of_heads(self.width, heads, CAUSAL, self.attention_bias, self.attention_bias)
        norms = [parts.RMSNorm(count * heads.width, self.rms_norm_eps) for count in (heads.count, heads.groups)]
        return plain.replace(q=parts.Chain((plain.q, norms[0])), k=parts.Chain((plain.k, norms[1])))

    def names_in_block(self) -> dict[str, str]:
        names = super().names_in_block()
        for one in ("0.pre", "1.pre", "0.op.q", "0.op.k"):
            del names[one]
        projections = {f"0.op.{one}.steps.0": f"self_attn.{one}_proj" for one in "qk"}
        norms = {f"0.op.{one}.steps.1": f"self_attn.{one}_norm" for one in "qk"}
        placed = {"0.post": "post_attention_layernorm", "1.post": "post_feedforward_layernorm"}
        return names | projections | norms | placed
