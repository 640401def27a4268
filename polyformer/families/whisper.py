"""Whisper (Radford et al. 2023): BART's pre-norm relative, whose encoder reads log-mel features of 30 seconds."""

from __future__ import annotations

from typing import Any, ClassVar

from polyformer import parts
from polyformer.families.blocks import bart_rows, block, drop
from polyformer.families.config import Family, Head, activation
from polyformer.spec import Spec
from polyformer.weights.names import Names, Row

Projecting = parts.Attention | parts.CrossAttention


class Whisper(Family):
    """The keys of a Whisper `config.json`."""

    model_type: ClassVar[str] = "whisper"
    architectures: ClassVar[dict[str, Head]] = {"WhisperForConditionalGeneration": "lm", "WhisperModel": "none"}
    paper: ClassVar[str] = "Radford et al. 2023"
    tokenizer: ClassVar[str] = "byte-level BPE"
    aliases: ClassVar[dict[str, str]] = {
        "hidden_size": "d_model",
        "num_attention_heads": "encoder_attention_heads",
        "num_hidden_layers": "encoder_layers",
        "num_key_value_heads": "encoder_attention_heads",
    }
    unused: ClassVar[dict[str, Any]] = {
        **dict.fromkeys(("apply_spec_augment", "scale_embedding", "use_weighted_layer_sum"), False),
        "classifier_proj_size": 256,
        "is_encoder_decoder": True,
        "mask_feature_length": 10,
        "mask_feature_min_masks": 0,
        "mask_feature_prob": 0.0,
        "mask_time_length": 10,
        "mask_time_min_masks": 2,
        "mask_time_prob": 0.05,
        "median_filter_width": 7,
    }

    vocab_size: int = 51865
    num_mel_bins: int = 80
    d_model: int = 384
    encoder_layers: int = 4
    encoder_attention_heads: int = 6
    encoder_ffn_dim: int = 1536
    encoder_layerdrop: float = 0.0
    decoder_layers: int = 4
    decoder_attention_heads: int = 6
    decoder_ffn_dim: int = 1536
    decoder_layerdrop: float = 0.0
    activation_function: str = "gelu"
    dropout: float = 0.0
    attention_dropout: float = 0.0
    activation_dropout: float = 0.0
    max_source_positions: int = 1500
    max_target_positions: int = 448
    tie_word_embeddings: bool = True
    pad_token_id: int = 50256
    bos_token_id: int = 50256
    eos_token_id: int | tuple[int, ...] = 50256
    decoder_start_token_id: int = 50257

    def spec(self) -> parts.Transformer:
        width = self.d_model
        tokens = parts.TokenEmbedding(self.vocab_size, width, self.pad_token_id)
        reading = parts.Attention.of_width(width, self.encoder_attention_heads, parts.Everyone())
        writing = parts.Attention.of_width(width, self.decoder_attention_heads, parts.Causal())
        crossing = parts.CrossAttention.of_width(width, self.decoder_attention_heads)
        encoder = self._block(self.encoder_ffn_dim, reading)
        decoder = self._block(self.decoder_ffn_dim, writing, crossing)
        tied = self.tie_word_embeddings and self.head == "lm"
        return parts.Transformer(
            source=self._frames(),
            encoder=parts.Stack((encoder,) * self.encoder_layers, parts.LayerNorm(width), self.encoder_layerdrop),
            target=parts.Embed(tokens, parts.Learned(width, self.max_target_positions), dropout=drop(self.dropout)),
            decoder=parts.Stack((decoder,) * self.decoder_layers, parts.LayerNorm(width), self.decoder_layerdrop),
            head=parts.LMHead.of_width(width, self.vocab_size) if self.head == "lm" else None,
            ties=(parts.Tie("head.projection.weight", "target.tokens.weight"),) if tied else (),
        )

    def names(self) -> Names:
        below = "model." if self.head == "lm" else ""
        rows = [
            Row("source.stem.steps.0.{w}", f"{below}encoder.conv1.{{w}}"),
            Row("source.stem.steps.2.{w}", f"{below}encoder.conv2.{{w}}"),
            Row("source.positions.weight", f"{below}encoder.embed_positions.weight"),
            Row("encoder.norm.{w}", f"{below}encoder.layer_norm.{{w}}"),
            Row("target.tokens.weight", f"{below}decoder.embed_tokens.weight"),
            Row("target.positions.weight", f"{below}decoder.embed_positions.weight"),
            Row("decoder.norm.{w}", f"{below}decoder.layer_norm.{{w}}"),
            Row("head.projection.weight", "proj_out.weight"),
            *bart_rows("pre", below),
        ]
        return Names(rows)

    def _frames(self) -> parts.Frames:
        stem = (
            parts.Convolution(self.num_mel_bins, self.d_model, kernel=3, padding=1),
            parts.Activate("gelu"),
            parts.Convolution(self.d_model, self.d_model, kernel=3, stride=2, padding=1),
            parts.Activate("gelu"),
        )
        positions = parts.Table(self.d_model, self.max_source_positions, layout="halves", spacing="ends")
        return parts.Frames(parts.Chain(stem), self.num_mel_bins, positions, drop(self.dropout), padding="heard")

    def _block(self, hidden: int, *attentions: Projecting) -> parts.Chain:
        """Return a block; its keys are projected without a bias, which the softmax would not notice."""
        keyless = parts.Linear(self.d_model, self.d_model, bias=False)
        kernel = parts.Softmax(dropout=self.attention_dropout)
        made: list[Spec] = [one.replace(k=keyless, kernel=kernel) for one in attentions]
        forward = parts.FeedForward.of_widths(self.d_model, hidden, activation(self.activation_function))
        made.append(forward.replace(dropout=drop(self.activation_dropout)))
        return block(*made, norm=parts.LayerNorm(self.d_model), placement="pre", dropout=self.dropout)
