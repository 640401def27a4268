"""Falcon (Almazrouei et al. 2023) in its three forms.

- 7B: all queries share one head of keys and values; attention and feed-forward stand side by side behind one norm.
- 40B and later (`new_decoder_architecture`): grouped keys and values, two sides with a norm each, or with one.
- RW: ALiBi and biases, one sublayer after the other.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from polyformer import parts
from polyformer.families.blocks import drop
from polyformer.families.config import Head, activation
from polyformer.families.decoder import CAUSAL, Decoder, heads_of
from polyformer.families.rope import RopeParameters, modern_rope
from polyformer.spec import Spec
from polyformer.weights.fused import SplitHeads
from polyformer.weights.names import Row, rows_below


class Falcon(Decoder):
    """The keys of a Falcon `config.json`."""

    model_type: ClassVar[str] = "falcon"
    architectures: ClassVar[dict[str, Head]] = heads_of("Falcon")
    paper: ClassVar[str] = "Almazrouei et al. 2023"
    tokenizer: ClassVar[str] = "byte-level BPE"
    base: ClassVar[str] = "transformer"
    classifier: ClassVar[str] = "classifier"
    implied: ClassVar[dict[str, Any]] = {"bos_token_id": 11, "eos_token_id": 11}
    aliases: ClassVar[dict[str, str]] = {
        "n_embed": "hidden_size",
        "n_head": "num_attention_heads",
        "n_head_kv": "num_kv_heads",
        "n_layer": "num_hidden_layers",
    }
    unused: ClassVar[dict[str, Any]] = {"apply_residual_connection_post_layernorm": False}

    vocab_size: int = 65024
    hidden_size: int = 4544
    num_hidden_layers: int = 32
    num_attention_heads: int = 71
    num_ln_in_parallel_attn: int | None = None
    layer_norm_epsilon: float = 1e-5
    hidden_dropout: float = 0.0
    attention_dropout: float = 0.0
    num_kv_heads: int | None = None
    alibi: bool = False
    new_decoder_architecture: bool = False
    multi_query: bool = True
    parallel_attn: bool = True
    bias: bool = False
    max_position_embeddings: int = 2048
    rope_parameters: RopeParameters | None = None
    ffn_hidden_size: int | None = None
    activation: str = "gelu"
    tie_word_embeddings: bool = True

    @classmethod
    def modern(cls, data: Mapping[str, Any], where: str) -> Mapping[str, Any]:
        return modern_rope(super().modern(data, where), where)

    def check(self) -> None:
        super().check()
        one = not self.new_decoder_architecture and self.num_ln_in_parallel_attn not in (None, 1)
        self.require(not one, "num_ln_in_parallel_attn is for the new decoder architecture")
        both = self.new_decoder_architecture and not self.parallel_attn
        self.require(not both, "the new decoder architecture has parallel_attn")

    @property
    def width(self) -> int:
        return self.hidden_size

    @property
    def layers(self) -> int:
        return self.num_hidden_layers

    @property
    def heads(self) -> parts.Heads:
        """How the width is cut."""
        several = self.num_attention_heads if not self.new_decoder_architecture else self.num_kv_heads
        groups = 1 if self.multi_query and not self.new_decoder_architecture else several
        return parts.Heads.of_width(self.width, self.num_attention_heads, groups)

    def block(self, layer: int) -> Spec:
        hidden = 4 * self.width if self.ffn_hidden_size is None else self.ffn_hidden_size
        thinking = parts.FeedForward.of_widths(self.width, hidden, activation(self.activation), self.bias)
        attention, dropped, norm = self._attention(), drop(self.hidden_dropout), self.norm()
        if not self.parallel_attn:
            looking = parts.Residual(attention, pre=norm, post=drop(self.attention_dropout))
            return parts.Chain((looking, parts.Residual(thinking, pre=norm, post=dropped)))
        if self._two_norms():
            sides = tuple(parts.Chain((norm, op)) for op in (attention, thinking))
            return parts.Residual(parts.Branches(sides), post=dropped)
        return parts.Residual(parts.Branches((attention, thinking)), pre=norm, post=dropped)

    def norm(self) -> parts.Norm:
        return parts.LayerNorm(self.width, self.layer_norm_epsilon)

    def rows(self, base: str) -> list[Row]:
        ours, disk = "decoder.blocks.{i}", f"{base}h.{{i}}"
        if not self.parallel_attn:
            attention, thinking = "steps.0.op", "steps.1.op"
            norms = {"steps.0.pre": "input_layernorm", "steps.1.pre": "post_attention_layernorm"}
        elif self._two_norms():
            attention, thinking = "op.steps.0.steps.1", "op.steps.1.steps.1"
            norms = {"op.steps.0.steps.0": "ln_attn", "op.steps.1.steps.0": "ln_mlp"}
        else:
            attention, thinking, norms = "op.steps.0", "op.steps.1", {"pre": "input_layernorm"}
        names = {
            f"{attention}.o": "self_attention.dense",
            f"{thinking}.up": "mlp.dense_h_to_4h",
            f"{thinking}.down": "mlp.dense_4h_to_h",
        }
        qkv = [f"{ours}.{attention}.{one}.{{w}}" for one in "qkv"]
        heads = self.heads
        split = SplitHeads(heads.groups, heads.count // heads.groups, heads.width)
        return [
            Row("target.tokens.weight", f"{base}word_embeddings.weight"),
            *rows_below(ours, disk, norms | names),
            Row(qkv, f"{disk}.self_attention.query_key_value.{{w}}", split),
            Row("decoder.norm.{w}", f"{base}ln_f.{{w}}"),
        ]

    def _attention(self) -> parts.Attention:
        """Return attention; the reference scales ALiBi with the scores, and drops weights only beside it."""
        heads = self.heads
        attention = parts.Attention.of_heads(self.width, heads, CAUSAL, self.bias, self.bias)
        if self.alibi:
            alibi = parts.Alibi(heads.count, scale=heads.width**-0.5, precision="bfloat16")
            return attention.replace(kernel=parts.Softmax(dropout=self.attention_dropout), position=alibi)
        rope = self.rope_parameters or RopeParameters(10000.0, "default")
        return attention.replace(position=rope.rotary(heads.width, self.max_position_embeddings))

    def _two_norms(self) -> bool:
        return self.new_decoder_architecture and self.num_ln_in_parallel_attn in (None, 2)
