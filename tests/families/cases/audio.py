"""Sound: Whisper and Wav2Vec2-Conformer, with each of their heads and positions."""

from __future__ import annotations

from typing import Any

from tests.families.cases.case import Case

WHISPER: dict[str, Any] = {
    "vocab_size": 50,
    "num_mel_bins": 8,
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 3,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 20,
    "max_source_positions": 11,
    "max_target_positions": 16,
    "pad_token_id": 49,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
    "begin_suppress_tokens": None,
}
CONFORMER: dict[str, Any] = {
    "vocab_size": 19,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "conv_dim": [6, 8, 10],
    "conv_stride": [5, 2, 2],
    "conv_kernel": [10, 3, 2],
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
    "conv_depthwise_kernel_size": 5,
    "apply_spec_augment": False,
    **dict.fromkeys(("hidden_dropout", "activation_dropout", "attention_dropout", "final_dropout"), 0.0),
    **dict.fromkeys(("feat_proj_dropout", "conformer_conv_dropout", "layerdrop"), 0.0),
}
LM = "WhisperForConditionalGeneration"
OTHER = {"activation_function": "relu", "tie_word_embeddings": False}


def conformer(name: str, head: str, changes: dict[str, Any]) -> Case:
    """Return a model that reads waveforms."""
    return Case(name, f"Wav2Vec2Conformer{head}", "Wav2Vec2ConformerConfig", CONFORMER | changes, "sound", (303,))


CASES = (
    Case("whisper", LM, "WhisperConfig", WHISPER, "features", (8, 22), cached=True),
    Case("whisper-untied", LM, "WhisperConfig", WHISPER | OTHER, "features", (8, 22), cached=True),
    Case("whisper-base", "WhisperModel", "WhisperConfig", WHISPER, "features", (8, 22)),
    conformer("wav2vec2-conformer", "Model", {}),
    conformer("wav2vec2-conformer-ctc", "ForCTC", {"hidden_act": "swish", "mask_time_prob": 0.0}),
    conformer(
        "wav2vec2-conformer-rotary",
        "Model",
        {"position_embeddings_type": "rotary", "feat_extract_norm": "layer", "conv_bias": True},
    ),
    conformer("wav2vec2-conformer-placeless", "Model", {"position_embeddings_type": None}),
)
