"""Images: ViT, DeiT and Swin, at the sizes that they are made for, square and not, and each of their heads."""

from __future__ import annotations

from typing import Any

from tests.families.cases.case import Case

VIT: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "image_size": 24,
    "patch_size": 8,
}
SWIN: dict[str, Any] = {
    "image_size": 32,
    "patch_size": 4,
    "embed_dim": 8,
    "depths": [2, 3],
    "num_heads": [2, 4],
    "window_size": 3,
    "drop_path_rate": 0.0,
}
OBLONG = {"image_size": [24, 16], "patch_size": [8, 4], "num_channels": 1, "hidden_act": "gelu_new"}
LABELS = {"num_labels": 5}
GPT2: dict[str, Any] = {
    "model_type": "gpt2",
    "vocab_size": 50,
    "n_embd": 12,
    "n_layer": 2,
    "n_head": 3,
    "n_positions": 16,
    "attn_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "resid_pdrop": 0.0,
}
BERT: dict[str, Any] = {
    "model_type": "bert",
    "vocab_size": 50,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 16,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}


def captions(name: str, encoder: dict[str, Any], decoder: dict[str, Any], *size: int) -> Case:
    """Return a model that writes about images of this size."""
    crossing = decoder | {"add_cross_attention": True, "is_decoder": True}
    sides = {"encoder": encoder, "decoder": crossing}
    return Case(name, "VisionEncoderDecoderModel", "VisionEncoderDecoderConfig", sides, "captions", size, cached=True)


CASES = (
    Case("vit", "ViTModel", "ViTConfig", VIT, "pixels", (3, 24, 24)),
    Case("vit-classifier", "ViTForImageClassification", "ViTConfig", VIT | LABELS, "pixels", (3, 24, 24)),
    Case(
        "vit-oblong",
        "ViTModel",
        "ViTConfig",
        VIT | OBLONG | {"qkv_bias": False, "pooler_output_size": 7, "pooler_act": "relu"},
        "pixels",
        (1, 24, 16),
    ),
    Case("vit-left-over", "ViTModel", "ViTConfig", VIT | {"image_size": 27}, "pixels", (3, 27, 27)),
    Case("deit", "DeiTModel", "DeiTConfig", VIT, "pixels", (3, 24, 24)),
    Case("deit-classifier", "DeiTForImageClassification", "DeiTConfig", VIT | LABELS, "pixels", (3, 24, 24)),
    Case("deit-teacher", "DeiTForImageClassificationWithTeacher", "DeiTConfig", VIT | LABELS, "pixels", (3, 24, 24)),
    Case("swin", "SwinModel", "SwinConfig", SWIN, "pixels", (3, 32, 32)),
    Case("swin-classifier", "SwinForImageClassification", "SwinConfig", SWIN | LABELS, "pixels", (3, 37, 27)),
    Case(
        "swin-positions",
        "SwinModel",
        "SwinConfig",
        SWIN | {"use_absolute_embeddings": True, "qkv_bias": False, "mlp_ratio": 1.5, "window_size": 4},
        "pixels",
        (3, 32, 32),
    ),
    captions("vision-encoder-decoder", VIT | {"model_type": "vit"}, GPT2, 3, 24, 24),
    captions("vision-encoder-decoder-deit-bert", VIT | {"model_type": "deit"}, BERT, 3, 24, 24),
    captions("vision-encoder-decoder-swin-gpt2", SWIN | {"model_type": "swin"}, GPT2, 3, 37, 27),
    captions("vision-encoder-decoder-swin-bert", SWIN | {"model_type": "swin"}, BERT, 3, 32, 32),
)
