"""GPT-NeoX (Black et al. 2022) and Pythia: attention and feed-forward side by side, a quarter of each head rotated."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, ClassVar

from torch import Tensor

from polyformer import parts
from polyformer.families.blocks import block, drop
from polyformer.families.config import Head, activation
from polyformer.families.decoder import CAUSAL, Decoder, heads_of, is_number, is_triangle
from polyformer.families.rope import RopeParameters, is_frequencies, modern_rope
from polyformer.spec import Spec
from polyformer.weights.fused import SplitHeads
from polyformer.weights.names import Row, rows_below


class GPTNeoX(Decoder):
    """The keys of a GPT-NeoX `config.json`."""

    model_type: ClassVar[str] = "gpt_neox"
    architectures: ClassVar[dict[str, Head]] = heads_of("GPTNeoX")
    paper: ClassVar[str] = "Black et al. 2022"
    tokenizer: ClassVar[str] = "byte-level BPE"
    base: ClassVar[str] = "gpt_neox"
    classifier: ClassVar[str] = "classifier"
    implied: ClassVar[dict[str, Any]] = {"bos_token_id": 0, "classifier_dropout": 0.1, "eos_token_id": 2}
    unused: ClassVar[dict[str, Any]] = {"attention_probs_dropout_prob": 0, "hidden_dropout_prob": 0}

    vocab_size: int = 50432
    hidden_size: int = 6144
    num_hidden_layers: int = 44
    num_attention_heads: int = 64
    intermediate_size: int = 24576
    hidden_act: str = "gelu"
    attention_dropout: float = 0.0
    hidden_dropout: float = 0.0
    max_position_embeddings: int = 2048
    layer_norm_eps: float = 1e-5
    use_parallel_residual: bool = True
    rope_parameters: RopeParameters | None = None
    attention_bias: bool = True

    @classmethod
    def modern(cls, data: Mapping[str, Any], where: str) -> Mapping[str, Any]:
        return modern_rope(super().modern(data, where), where, share=0.25)

    @property
    def width(self) -> int:
        return self.hidden_size

    @property
    def layers(self) -> int:
        return self.num_hidden_layers

    def embed(self) -> parts.Embed:
        return super().embed().replace(dropout=drop(self.hidden_dropout))

    def block(self, layer: int) -> Spec:
        bias, heads = self.attention_bias, parts.Heads.of_width(self.width, self.num_attention_heads)
        attention = parts.Attention.of_heads(self.width, heads, CAUSAL, bias, bias)
        attention = attention.replace(kernel=parts.Softmax(dropout=self.attention_dropout), position=self._rotary())
        thinking = parts.FeedForward.of_widths(self.width, self.intermediate_size, activation(self.hidden_act))
        if not self.use_parallel_residual:
            return block(attention, thinking, norm=self.norm(), placement="pre", dropout=self.hidden_dropout)
        dropped = (parts.Dropout(self.hidden_dropout),) if self.hidden_dropout else ()
        sides = tuple(parts.Chain((self.norm(), op, *dropped)) for op in (attention, thinking))
        return parts.Residual(parts.Branches(sides))

    def norm(self) -> parts.Norm:
        return parts.LayerNorm(self.width, self.layer_norm_eps)

    def rows(self, base: str) -> list[Row]:
        ours, disk = "decoder.blocks.{i}", f"{base}layers.{{i}}"
        steps = [f"steps.{i}.op" for i in (0, 1)], [f"steps.{i}.pre" for i in (0, 1)]
        sides = [f"op.steps.{i}.steps.1" for i in (0, 1)], [f"op.steps.{i}.steps.0" for i in (0, 1)]
        (attention, thinking), norms = sides if self.use_parallel_residual else steps
        heads = parts.Heads.of_width(self.width, self.num_attention_heads)
        names = {
            norms[0]: "input_layernorm",
            norms[1]: "post_attention_layernorm",
            f"{attention}.o": "attention.dense",
            f"{thinking}.up": "mlp.dense_h_to_4h",
            f"{thinking}.down": "mlp.dense_4h_to_h",
        }
        qkv = [f"{ours}.{attention}.{one}.{{w}}" for one in "qkv"]
        return [
            Row("target.tokens.weight", f"{base}embed_in.weight"),
            *rows_below(ours, disk, names),
            Row(qkv, f"{disk}.attention.query_key_value.{{w}}", SplitHeads(heads.count, 1, heads.width)),
            Row("decoder.norm.{w}", f"{base}final_layer_norm.{{w}}"),
        ]

    def head_rows(self, base: str = "") -> list[Row]:
        older = [Row("head.projection.weight", f"{base}embed_out.weight")] * (self.head == "lm")
        return [*older, *super().head_rows(base)]

    def module(self, name: str) -> str | None:
        return "lm_head" if name == "embed_out" else name

    def computed(self, base: str) -> dict[str, Callable[[Tensor], bool]]:
        attention = f"{base}layers.{{i}}.attention"
        frequencies = partial(is_frequencies, rotary=self._rotary())
        return {
            f"{attention}.bias": is_triangle,
            f"{attention}.masked_bias": is_number,
            f"{attention}.rotary_emb.inv_freq": frequencies,
        }

    def _rotary(self) -> parts.Rotary:
        rope = self.rope_parameters or RopeParameters(10000.0, "default", partial_rotary_factor=0.25)
        return rope.rotary(self.width // self.num_attention_heads, self.max_position_embeddings)
