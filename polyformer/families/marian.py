"""Marian (Junczys-Dowmunt et al. 2018) as the OPUS-MT translation models have it (Tiedemann and Thottingal 2020).

The 2017 Transformer in post-norm form, with sinusoidal positions in halves, a bias on the logits, and usually one
embedding for source, target and head.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor

from polyformer import parts
from polyformer.families.blocks import bart_rows, block, drop
from polyformer.families.config import Family, activation
from polyformer.parts.flow import start_flow
from polyformer.weights.names import Names, Reshape, Row


class Marian(Family):
    """The keys of a Marian `config.json`."""

    model_type: ClassVar[str] = "marian"
    architectures: ClassVar[tuple[str, ...]] = ("MarianMTModel",)
    aliases: ClassVar[dict[str, str]] = {
        "hidden_size": "d_model",
        "num_attention_heads": "encoder_attention_heads",
        "num_hidden_layers": "encoder_layers",
    }
    unused: ClassVar[dict[str, Any]] = {
        **dict.fromkeys(("classif_dropout", "classifier_dropout", "decoder_layerdrop", "encoder_layerdrop"), 0.0),
        **dict.fromkeys(("add_bias_logits", "add_final_layer_norm", "normalize_before", "normalize_embedding"), False),
        "extra_pos_embeddings": 0,
        "is_encoder_decoder": True,
        "static_position_embeddings": True,
    }

    vocab_size: int = 58101
    decoder_vocab_size: int | None = None
    max_position_embeddings: int = 1024
    d_model: int = 1024
    encoder_layers: int = 12
    encoder_ffn_dim: int = 4096
    encoder_attention_heads: int = 16
    decoder_layers: int = 12
    decoder_ffn_dim: int = 4096
    decoder_attention_heads: int = 16
    activation_function: str = "gelu"
    dropout: float = 0.1
    attention_dropout: float = 0.0
    activation_dropout: float = 0.0
    scale_embedding: bool = False
    share_encoder_decoder_embeddings: bool = True
    tie_word_embeddings: bool = True
    pad_token_id: int = 58100
    bos_token_id: int | None = None
    eos_token_id: int = 0
    decoder_start_token_id: int = 58100
    forced_eos_token_id: int = 0

    def check(self) -> None:
        super().check()
        shared = self.share_encoder_decoder_embeddings
        same = self.decoder_vocab_size in (None, self.vocab_size)
        self.require(same or not shared, "decoder_vocab_size differs from vocab_size, but they share embeddings")
        unclear = "shared embeddings with an untied head (tie_word_embeddings false) differ between versions of the "
        self.require(self.tie_word_embeddings or not shared, unclear + "reference library and are not supported")

    def spec(self) -> parts.Transformer:
        target = self.decoder_vocab_size or self.vocab_size
        own = "source.tokens.weight" if self.share_encoder_decoder_embeddings else "target.tokens.weight"
        tied = [parts.Tie("target.tokens.weight", own)] * self.share_encoder_decoder_embeddings
        tied += [parts.Tie("head.projection.weight", own)] * self.tie_word_embeddings
        norm, kernel = parts.LayerNorm(self.d_model), parts.Softmax(dropout=self.attention_dropout)
        reading = parts.Attention.of_width(self.d_model, self.encoder_attention_heads, parts.Everyone())
        writing = parts.Attention.of_width(self.d_model, self.decoder_attention_heads, parts.Causal())
        crossing = parts.CrossAttention.of_width(self.d_model, self.decoder_attention_heads)
        encoder = (reading.replace(kernel=kernel), self._feed_forward(self.encoder_ffn_dim))
        decoder = (
            *(one.replace(kernel=kernel) for one in (writing, crossing)),
            self._feed_forward(self.decoder_ffn_dim),
        )
        return parts.Transformer(
            source=self._embed(self.vocab_size),
            encoder=parts.Stack((block(*encoder, norm=norm, dropout=self.dropout),) * self.encoder_layers),
            target=self._embed(target),
            decoder=parts.Stack((block(*decoder, norm=norm, dropout=self.dropout),) * self.decoder_layers),
            head=parts.LMHead.of_width(self.d_model, target, bias=True),
            ties=tuple(tied),
        )

    def names(self) -> Names:
        shared = [Row("source.tokens.weight", "model.shared.weight")] * self.share_encoder_decoder_embeddings
        rows = [
            *shared,
            Row("source.tokens.weight", "model.encoder.embed_tokens.weight"),
            Row("target.tokens.weight", "model.decoder.embed_tokens.weight"),
            Row("head.projection.weight", "lm_head.weight"),
            Row("head.projection.bias", "final_logits_bias", Reshape(disk=(1, -1), ours=(-1,))),
            *bart_rows(),
        ]
        tables = (f"model.{stack}.embed_positions.weight" for stack in ("encoder", "decoder"))
        return Names(rows, computed=dict.fromkeys(tables, self._is_sinusoidal))

    def _embed(self, vocabulary: int) -> parts.Embed:
        tokens = parts.TokenEmbedding(vocabulary, self.d_model, self.pad_token_id)
        scale = math.sqrt(self.d_model) if self.scale_embedding else 1.0
        return parts.Embed(tokens, self._positions(), scale=scale, dropout=drop(self.dropout))

    def _positions(self) -> parts.Sinusoidal:
        return parts.Sinusoidal(self.d_model, self.max_position_embeddings, layout="halves")

    def _feed_forward(self, hidden: int) -> parts.FeedForward:
        made = parts.FeedForward.of_widths(self.d_model, hidden, activation(self.activation_function))
        return made.replace(dropout=drop(self.activation_dropout))

    def _is_sinusoidal(self, table: Tensor) -> bool:
        """Older files hold the position table; it must be the one that we compute."""
        if table.ndim != 2 or table.shape[1] != self.d_model:
            return False
        places = torch.zeros(1, len(table))
        expected = self._positions().replace(length=None).build()(places, start_flow(places))[0]
        return torch.allclose(table.float(), expected, atol=max(1e-4, torch.finfo(table.dtype).eps))
