"""What BART and its kin (mBART, M2M100, Pegasus, Marian) share.

All are the 2017 Transformer in fairseq's form, under one set of names. They differ in where the norms stand, in their
positions, in whether embeddings are normalised and whether logits have a bias.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from polyformer import parts
from polyformer.families.blocks import Placement, bart_rows, block, drop
from polyformer.families.config import Family, activation, keys
from polyformer.parts.flow import start_flow
from polyformer.spec import Spec
from polyformer.weights.names import Check, Names, Reshape, Row, rows_below

STACKS = {"source": "encoder", "target": "decoder"}

UNREAD = ("classif_dropout", "classifier_dropout", "extra_pos_embeddings", "prefix", "save_step")
"""Keys of older files that say nothing of the model."""


def layout(before: bool, embedding: bool, static: bool) -> dict[str, bool]:
    """Return what files of 2020 say of their family, as one class of the reference library made all of them:
    whether norms stand before sublayers, whether embeddings have one, whether positions are computed."""
    norms = {"add_final_layer_norm": before, "normalize_before": before, "normalize_embedding": embedding}
    return norms | {"static_position_embeddings": static}


class BartLike(Family, abstract=True):
    """The keys that the whole kin has in its `config.json`. By class variables a family says what it is like:

    - `placement`: of norms; with "pre", each stack has one at its end as well.
    - `normed`: whether embeddings are normalised.
    - `biased`: whether logits have a bias.
    - `kept`: whether a computed position table is saved with the weights.
    """

    placement: ClassVar[Placement] = "post"
    normed: ClassVar[bool] = False
    biased: ClassVar[bool] = True
    kept: ClassVar[bool] = False
    aliases: ClassVar[dict[str, str]] = {
        "hidden_size": "d_model",
        "num_attention_heads": "encoder_attention_heads",
        "num_hidden_layers": "encoder_layers",
    }
    unused: ClassVar[dict[str, Any]] = {
        "add_bias_logits": False,
        "force_bos_token_to_be_generated": False,
        "is_encoder_decoder": True,
        "output_past": True,
    }

    vocab_size: int = 50265
    max_position_embeddings: int = 1024
    d_model: int = 1024
    encoder_layers: int = 12
    encoder_ffn_dim: int = 4096
    encoder_attention_heads: int = 16
    encoder_layerdrop: float = 0.0
    decoder_layers: int = 12
    decoder_ffn_dim: int = 4096
    decoder_attention_heads: int = 16
    decoder_layerdrop: float = 0.0
    activation_function: str = "gelu"
    dropout: float = 0.1
    attention_dropout: float = 0.0
    activation_dropout: float = 0.0
    scale_embedding: bool = False
    tie_word_embeddings: bool = True
    pad_token_id: int = 1
    eos_token_id: int = 2

    def check(self) -> None:
        super().check()
        unclear = "shared embeddings with an untied head (tie_word_embeddings false) differ between versions of the "
        self.require(self.tie_word_embeddings or not self.shared, unclear + "reference library and are not supported")

    @classmethod
    def modern(cls, data: Mapping[str, Any], where: str) -> Mapping[str, Any]:
        return {key: value for key, value in data.items() if key not in UNREAD or key in keys(cls)}

    @property
    def shared(self) -> bool:
        """Whether source and target have one embedding."""
        return True

    @property
    def written(self) -> int:
        """How many tokens the decoder knows."""
        return self.vocab_size

    @property
    def positions(self) -> parts.Position:
        """What tells the encoder and the decoder the order of tokens."""
        return parts.Learned(self.d_model, self.max_position_embeddings, offset=2)

    def spec(self) -> parts.Transformer:
        own = "source.tokens.weight" if self.shared else "target.tokens.weight"
        tied = [parts.Tie("target.tokens.weight", own)] * self.shared
        tied += [parts.Tie("head.projection.weight", own)] * (self.tie_word_embeddings and self.head == "lm")
        norm = parts.LayerNorm(self.d_model)
        final = norm if self.placement == "pre" else None
        reading = self._attention(self.encoder_attention_heads, parts.SameDocument())
        writing = self._attention(self.decoder_attention_heads, parts.Causal() & parts.SameDocument())
        crossing = parts.CrossAttention(writing.q, writing.k, writing.v, writing.o, writing.heads, writing.kernel)
        encoder = (reading, self._feed_forward(self.encoder_ffn_dim))
        decoder = (writing, crossing, self._feed_forward(self.decoder_ffn_dim))
        blocks = [block(*one, norm=norm, placement=self.placement, dropout=self.dropout) for one in (encoder, decoder)]
        return parts.Transformer(
            source=self._embed(self.vocab_size),
            encoder=parts.Stack((blocks[0],) * self.encoder_layers, final, self.encoder_layerdrop),
            target=self._embed(self.written),
            decoder=parts.Stack((blocks[1],) * self.decoder_layers, final, self.decoder_layerdrop),
            head=self.answers(),
            ties=tuple(tied),
        )

    def answers(self) -> Spec | None:
        """Return the head."""
        return parts.LMHead.of_width(self.d_model, self.written, self.biased) if self.head == "lm" else None

    def names(self) -> Names:
        below = "" if self.head == "none" else "model."
        rows = [
            *[Row("source.tokens.weight", f"{below}shared.weight")] * self.shared,
            *(Row(f"{side}.tokens.weight", f"{below}{stack}.embed_tokens.weight") for side, stack in STACKS.items()),
            *bart_rows(self.placement, below),
            Row("head.projection.weight", "lm_head.weight"),
            Row("head.projection.bias", "final_logits_bias", Reshape(disk=(1, -1), ours=(-1,))),
            *rows_below("head.steps", "classification_head", {"2": "dense", "5": "out_proj"}),
            Row("head.{w}", "qa_outputs.{w}"),
        ]
        computed: dict[str, Check] = {}
        added: dict[str, Callable[[], Tensor]] = {}
        for side, stack in STACKS.items():
            rows.append(Row(f"{side}.norm.{{w}}", f"{below}{stack}.layernorm_embedding.{{w}}"))
            rows.append(Row(f"{stack}.norm.{{w}}", f"{below}{stack}.layer_norm.{{w}}"))
            table = f"{below}{stack}.embed_positions.weight"
            if isinstance(self.positions, parts.Sinusoidal):
                computed[table] = self._is_sinusoidal
                added |= {table: functools.partial(self._table, self.max_position_embeddings)} if self.kept else {}
            else:
                rows.append(Row(f"{side}.positions.weight", table))
            computed[f"{below}{stack}.version"] = lambda version: True  # fairseq's, of its own format
        return Names(rows, computed, added)

    def _table(self, length: int) -> Tensor:
        """Return the position table as checkpoints have it: the number of a row is its position's, offset included."""
        places = torch.zeros(1, length)
        made = self.positions.replace(length=None, offset=0).build()
        return made(places, start_flow(places))[0]

    def _is_sinusoidal(self, table: Tensor) -> bool:
        """Older files hold the position table; it must be the one that we compute."""
        if table.ndim != 2 or table.shape[1] != self.d_model:
            return False
        differs = (table.float() - self._table(len(table))).abs()[self.positions.offset :]
        return bool((differs <= max(1e-4, torch.finfo(table.dtype).eps)).all())

    def _embed(self, vocabulary: int) -> parts.Embed:
        tokens = parts.TokenEmbedding(vocabulary, self.d_model, self.pad_token_id)
        norm = parts.LayerNorm(self.d_model) if self.normed else None
        scale = math.sqrt(self.d_model) if self.scale_embedding else 1.0
        return parts.Embed(tokens, self.positions, scale=scale, norm=norm, dropout=drop(self.dropout))

    def _attention(self, heads: int, see: parts.Rule) -> parts.Attention:
        made = parts.Attention.of_width(self.d_model, heads, see)
        return made.replace(kernel=parts.Softmax(dropout=self.attention_dropout))

    def _feed_forward(self, hidden: int) -> parts.FeedForward:
        made = parts.FeedForward.of_widths(self.d_model, hidden, activation(self.activation_function))
        return made.replace(dropout=drop(self.activation_dropout))
