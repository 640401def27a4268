"""BLOOM (BigScience 2022): ALiBi instead of positions, a norm behind the embeddings."""

from __future__ import annotations

from typing import Any, ClassVar

from polyformer import parts
from polyformer.families.blocks import block, drop
from polyformer.families.config import Head
from polyformer.families.decoder import CAUSAL, Decoder, heads_of
from polyformer.spec import Spec
from polyformer.weights.fused import SplitHeads
from polyformer.weights.names import Row, rows_below


class Bloom(Decoder):
    """The keys of a BLOOM `config.json`."""

    model_type: ClassVar[str] = "bloom"
    architectures: ClassVar[dict[str, Head]] = heads_of("Bloom")
    paper: ClassVar[str] = "BigScience Workshop 2022"
    tokenizer: ClassVar[str] = "byte-level BPE"
    base: ClassVar[str] = "transformer"
    classifier: ClassVar[str] = "classifier"
    implied: ClassVar[dict[str, Any]] = {"bos_token_id": 1, "eos_token_id": 2}
    aliases: ClassVar[dict[str, str]] = {
        "n_embed": "hidden_size",
        "num_attention_heads": "n_head",
        "num_hidden_layers": "n_layer",
    }
    unused: ClassVar[dict[str, Any]] = {
        **dict.fromkeys(("attention_softmax_in_fp32", "bias_dropout_fusion", "masked_softmax_fusion"), True),
        "n_inner": None,
        "offset_alibi": 100,
        "skip_bias_add": True,
        "skip_bias_add_qkv": False,
        "slow_but_exact": False,
        "unk_token_id": 0,
    }

    vocab_size: int = 250880
    hidden_size: int = 64
    n_layer: int = 2
    n_head: int = 8
    layer_norm_epsilon: float = 1e-5
    apply_residual_connection_post_layernorm: bool = False
    hidden_dropout: float = 0.0
    attention_dropout: float = 0.0
    pretraining_tp: int = 1  # how it was trained; says nothing of the model unless `slow_but_exact`
    seq_length: int | None = None  # of the texts it was trained on
    tie_word_embeddings: bool = True

    @property
    def width(self) -> int:
        return self.hidden_size

    @property
    def layers(self) -> int:
        return self.n_layer

    def embed(self) -> parts.Embed:
        return super().embed().replace(norm=self.norm())

    def block(self, layer: int) -> Spec:
        attention = parts.Attention.of_width(self.width, self.n_head, CAUSAL)
        kernel = parts.Softmax(dropout=self.attention_dropout)
        attention = attention.replace(kernel=kernel, position=parts.Alibi(self.n_head))
        thinking = parts.FeedForward.of_widths(self.width, 4 * self.width, "gelu_tanh")
        if not self.apply_residual_connection_post_layernorm:
            return block(attention, thinking, norm=self.norm(), placement="pre", dropout=self.hidden_dropout)
        dropped = drop(self.hidden_dropout)
        norm, sides = self.norm(), (parts.Residual(op, post=dropped) for op in (attention, thinking))
        return parts.Chain(tuple(step for side in sides for step in (norm, side)))

    def norm(self) -> parts.Norm:
        return parts.LayerNorm(self.width, self.layer_norm_epsilon)

    def rows(self, base: str) -> list[Row]:
        ours, disk = "decoder.blocks.{i}.steps", f"{base}h.{{i}}"
        normed = self.apply_residual_connection_post_layernorm
        norms, (attention, thinking) = (("0", "2"), "13") if normed else (("0.pre", "1.pre"), "01")
        names = {
            norms[0]: "input_layernorm",
            norms[1]: "post_attention_layernorm",
            f"{attention}.op.o": "self_attention.dense",
            f"{thinking}.op.up": "mlp.dense_h_to_4h",
            f"{thinking}.op.down": "mlp.dense_4h_to_h",
        }
        qkv = [f"{ours}.{attention}.op.{one}.{{w}}" for one in "qkv"]
        heads = parts.Heads.of_width(self.width, self.n_head)
        return [
            Row("target.tokens.weight", f"{base}word_embeddings.weight"),
            Row("target.norm.{w}", f"{base}word_embeddings_layernorm.{{w}}"),
            *rows_below(ours, disk, names),
            Row(qkv, f"{disk}.self_attention.query_key_value.{{w}}", SplitHeads(heads.count, 1, heads.width)),
            Row("decoder.norm.{w}", f"{base}ln_f.{{w}}"),
        ]
