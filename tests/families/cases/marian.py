"""Marian: embeddings shared or not, each activation, an odd width."""

from __future__ import annotations

from typing import Any

from tests.families.cases.case import Case

SIZES: dict[str, Any] = {
    "vocab_size": 50,
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 3,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 20,
    "max_position_embeddings": 32,
    "pad_token_id": 49,
    "eos_token_id": 0,
    "decoder_start_token_id": 49,
    "dropout": 0.0,
}
SEPARATE = {"share_encoder_decoder_embeddings": False, "decoder_vocab_size": 60}
CHANGES: dict[str, dict[str, Any]] = {
    "marian": {"activation_function": "swish", "scale_embedding": True},
    "marian-separate": {"activation_function": "relu", "scale_embedding": True, **SEPARATE},
    "marian-untied": {"activation_function": "gelu", "tie_word_embeddings": False, **SEPARATE},
    "marian-odd-width": {"d_model": 15, "encoder_attention_heads": 3, "decoder_attention_heads": 5},
}
CASES = tuple(
    Case(name, "MarianMTModel", "MarianConfig", SIZES | changes, given="pairs", cached=True)
    for name, changes in CHANGES.items()
)
