"""MPT (MosaicML 2023): ALiBi, no biases anywhere."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from polyformer import parts
from polyformer.families import generation
from polyformer.families.blocks import block
from polyformer.families.config import LABELS, PLAIN, REMARKS, Head
from polyformer.families.decoder import CAUSAL, Decoder, heads_of
from polyformer.spec import Record, Spec
from polyformer.weights.names import Row, Split, rows_below


class MptAttention(Record):
    """The keys of `attn_config`. Those with one value here the reference does not obey; `attn_impl` changes nothing."""

    attn_type: Literal["multihead_attention"] = "multihead_attention"
    attn_pdrop: float = 0.0
    attn_impl: Literal["torch", "flash", "triton"] = "torch"
    clip_qkv: float | None = None
    softmax_scale: float | None = None
    prefix_lm: Literal[False] = False
    qk_ln: Literal[False] = False
    attn_uses_sequence_id: Literal[False] = False
    alibi: Literal[True] = True
    alibi_bias_max: Literal[8] = 8


class Mpt(Decoder):
    """The keys of an MPT `config.json`."""

    model_type: ClassVar[str] = "mpt"
    architectures: ClassVar[dict[str, Head]] = heads_of("Mpt")
    paper: ClassVar[str] = "MosaicML 2023"
    tokenizer: ClassVar[str] = "byte-level BPE"
    base: ClassVar[str] = "transformer"
    classifier: ClassVar[str] = "classifier"
    aliases: ClassVar[dict[str, str]] = {
        "hidden_size": "d_model",
        "num_attention_heads": "n_heads",
        "num_hidden_layers": "n_layers",
    }
    unused: ClassVar[dict[str, Any]] = {
        "emb_pdrop": 0.0,
        "embedding_fraction": 1.0,
        "expansion_ratio": 4,
        "init_device": "cpu",
        "learned_pos_emb": True,
        "logit_scale": None,
        "no_bias": True,
        "norm_type": "low_precision_layernorm",
        "resid_pdrop": 0.0,
    }

    d_model: int = 2048
    n_heads: int = 16
    n_layers: int = 24
    max_seq_len: int = 2048
    vocab_size: int = 50368
    layer_norm_epsilon: float = 1e-5
    attn_config: MptAttention = MptAttention()
    tie_word_embeddings: bool = True

    @classmethod
    def modern(cls, data: Mapping[str, Any], where: str) -> Mapping[str, Any]:
        """Take from `attn_config` what newer versions write there that is of no attention."""
        said = data.get("attn_config")
        if not isinstance(said, Mapping):
            return data
        foreign = REMARKS | generation.KEYS | {*PLAIN, *LABELS, "is_encoder_decoder"}
        return {**data, "attn_config": {key: value for key, value in said.items() if key not in foreign}}

    @property
    def width(self) -> int:
        return self.d_model

    @property
    def layers(self) -> int:
        return self.n_layers

    def block(self, layer: int) -> Spec:
        said = self.attn_config
        attention = parts.Attention.of_width(self.width, self.n_heads, CAUSAL, bias=False).replace(
            kernel=parts.Softmax(said.softmax_scale, said.attn_pdrop),
            position=parts.Alibi(self.n_heads),
        )
        if said.clip_qkv is not None:
            clipped = parts.Chain((attention.q, parts.Clip(said.clip_qkv)))
            attention = attention.replace(q=clipped, k=clipped, v=clipped)
        thinking = parts.FeedForward.of_widths(self.width, 4 * self.width, "gelu", bias=False)
        return block(attention, thinking, norm=self.norm(), placement="pre", dropout=said.attn_pdrop)

    def norm(self) -> parts.Norm:
        return parts.LayerNorm(self.width, self.layer_norm_epsilon, bias=False)

    def rows(self, base: str) -> list[Row]:
        ours, disk = "decoder.blocks.{i}.steps", f"{base}blocks.{{i}}"
        names = {
            "0.pre": "norm_1",
            "1.pre": "norm_2",
            "0.op.o": "attn.out_proj",
            "1.op.up": "ffn.up_proj",
            "1.op.down": "ffn.down_proj",
        }
        matrix = "" if self.attn_config.clip_qkv is None else ".steps.0"
        qkv = [f"{ours}.0.op.{one}{matrix}.weight" for one in "qkv"]
        return [
            Row("target.tokens.weight", f"{base}wte.weight"),
            *rows_below(ours, disk, names),
            Row(qkv, f"{disk}.attn.Wqkv.weight", Split(3)),
            Row("decoder.norm.{w}", f"{base}norm_f.{{w}}"),
        ]
