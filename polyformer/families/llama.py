"""LLaMA (Touvron et al. 2023) and what its many relatives share: RMSNorm, rotary positions, gated feed-forward."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, ClassVar

from torch import Tensor

from polyformer import parts
from polyformer.families.blocks import Placement, block
from polyformer.families.config import Head, activation
from polyformer.families.decoder import CAUSAL, Decoder, heads_of
from polyformer.families.rope import RopeParameters, is_frequencies, modern_rope
from polyformer.spec import Spec
from polyformer.weights.names import Row, rows_below


class LlamaLike(Decoder, abstract=True):
    """LLaMA's relatives. They override what differs: `see`, `attention`, `feed_forward`, `norm`, `names_in_block`.

    `theta` is the base of rotary positions where a file names none, `act` the key that names the activation,
    `placement` where the norms stand.
    """

    theta: ClassVar[float] = 10000.0
    act: ClassVar[str] = "hidden_act"
    placement: ClassVar[Placement] = "pre"

    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    rope_parameters: RopeParameters | None = None
    attention_dropout: float = 0.0

    @classmethod
    def modern(cls, data: Mapping[str, Any], where: str) -> Mapping[str, Any]:
        """Beside the older spellings, name the width of a head: some of the reference's classes take null for it."""
        found = modern_rope(super().modern(data, where), where, cls.theta)
        sizes = [found.get(key, getattr(cls, key)) for key in ("hidden_size", "num_attention_heads")]
        if found.get("head_dim", cls.head_dim) is None and all(isinstance(size, int) and size > 0 for size in sizes):
            found["head_dim"] = sizes[0] // sizes[1]
        return found

    @property
    def width(self) -> int:
        return self.hidden_size

    @property
    def layers(self) -> int:
        return self.num_hidden_layers

    @property
    def heads(self) -> parts.Heads:
        """How many heads there are, and how wide."""
        count = max(self.num_attention_heads, 1)
        width = self.hidden_size // count if self.head_dim is None else self.head_dim
        groups = self.num_attention_heads if self.num_key_value_heads is None else self.num_key_value_heads
        return parts.Heads(self.num_attention_heads, groups, width)

    def embed(self) -> parts.Embed:
        known = self.pad_token_id is not None and 0 <= self.pad_token_id < self.vocab_size
        padding = self.pad_token_id if known else None
        return parts.Embed(parts.TokenEmbedding(self.vocab_size, self.width, padding))

    def block(self, layer: int) -> Spec:
        attention = self.attention(layer).replace(see=self.see(layer), kernel=self.kernel(), position=self.rotary())
        return block(attention, self.feed_forward(layer), norm=self.norm(), placement=self.placement)

    def see(self, layer: int) -> parts.Rule:
        """Return what the rows of a layer look at."""
        return CAUSAL

    def attention(self, layer: int) -> parts.Attention:
        """Return the projections of a layer's attention."""
        return parts.Attention.of_heads(self.width, self.heads, CAUSAL)

    def kernel(self) -> parts.Kernel:
        """Return what computes attention."""
        return parts.Softmax(dropout=self.attention_dropout)

    def rotary(self) -> parts.Rotary:
        """Return the position scheme."""
        rope = self.rope_parameters or RopeParameters(self.theta, "default")
        return rope.rotary(self.heads.width, self.max_position_embeddings)

    def feed_forward(self, layer: int) -> Spec:
        """Return what a layer does to each row."""
        return parts.FeedForward.gated(self.width, self.intermediate_size, activation(getattr(self, self.act)))

    def norm(self) -> parts.Norm:
        return parts.RMSNorm(self.width, self.rms_norm_eps)

    def names_in_block(self) -> dict[str, str]:
        """Return the modules of a block, in our names and on disk."""
        return {
            "0.pre": "input_layernorm",
            "1.pre": "post_attention_layernorm",
            **{f"0.op.{one}": f"self_attn.{one}_proj" for one in "qkvo"},
            **{f"1.op.{one}": f"mlp.{one}_proj" for one in ("gate", "up", "down")},
        }

    def rows(self, base: str) -> list[Row]:
        return [
            Row("target.tokens.weight", f"{base}embed_tokens.weight"),
            *rows_below("decoder.blocks.{i}.steps", f"{base}layers.{{i}}", self.names_in_block()),
            Row("decoder.norm.{w}", f"{base}norm.{{w}}"),
        ]

    def computed(self, base: str) -> dict[str, Callable[[Tensor], bool]]:
        check = partial(is_frequencies, rotary=self.rotary())
        return {f"{base}layers.{{i}}.self_attn.rotary_emb.inv_freq": check}


class Llama(LlamaLike):
    """The keys of a LLaMA `config.json`."""

    model_type: ClassVar[str] = "llama"
    architectures: ClassVar[dict[str, Head]] = heads_of("Llama")
    paper: ClassVar[str] = "Touvron et al. 2023"
    tokenizer: ClassVar[str] = "SentencePiece BPE, byte-level BPE"
    span_base: ClassVar[str] = "transformer"
    implied: ClassVar[dict[str, Any]] = {"bos_token_id": 1, "eos_token_id": 2}
    unused: ClassVar[dict[str, Any]] = {"is_llama_config": True, "pretraining_tp": 1, "rope_interleaved": False}

    hidden_act: str = "silu"
    attention_bias: bool = False
    mlp_bias: bool = False

    def attention(self, layer: int) -> parts.Attention:
        return parts.Attention.of_heads(self.width, self.heads, CAUSAL, self.attention_bias, self.attention_bias)

    def feed_forward(self, layer: int) -> Spec:
        hidden, chosen = self.intermediate_size, activation(self.hidden_act)
        return parts.FeedForward.gated(self.width, hidden, chosen, self.mlp_bias)
