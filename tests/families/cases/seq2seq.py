"""BART's kin and T5's: each head, norm placement, position scheme, gate, tie, and the mixture of experts."""

from __future__ import annotations

from typing import Any

from tests.families.cases.case import Case

BART: dict[str, Any] = {
    "vocab_size": 50,
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 3,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 20,
    "encoder_layerdrop": 0.0,
    "decoder_layerdrop": 0.0,
    "max_position_embeddings": 32,
    "dropout": 0.0,
    "attention_dropout": 0.0,
    "id2label": {0: "bad", 1: "good", 2: "neither"},
}
T5: dict[str, Any] = {
    "vocab_size": 50,
    "d_model": 16,
    "d_kv": 6,
    "d_ff": 24,
    "num_layers": 2,
    "num_decoder_layers": 3,
    "num_heads": 3,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 6,
    "dropout_rate": 0.0,
    "decoder_start_token_id": 0,
    "id2label": {0: "bad", 1: "good"},
}
SWITCH = T5 | {
    "num_layers": 4,
    "num_experts": 3,
    "num_sparse_encoder_layers": 2,
    "num_sparse_decoder_layers": 1,
    "router_jitter_noise": 0.0,
}


def written(name: str, model: str, config: str, keys: dict[str, Any], **more: Any) -> Case:
    """A model that writes: it is given pairs, and read token by token."""
    return Case(name, model, config, keys, given="pairs", cached=True, **more)


def kin(name: str, reference: str, keys: dict[str, Any], end: int, judging: bool) -> list[Case]:
    """The cases of one family of BART's kin: writing, the bare model, and its classifiers."""
    config = f"{reference}Config"
    found = [
        written(name, f"{reference}ForConditionalGeneration", config, BART | keys),
        Case(f"{name}-base", f"{reference}Model", config, BART | keys, given="pairs"),
    ]
    if judging:
        heads = {"sequence": "ForSequenceClassification", "span": "ForQuestionAnswering"}
        padded = {"padding": 1} if name == "mbart" else {}  # which finds a text's last token by what is no padding
        found += [
            Case(f"{name}-{head}", reference + model, config, BART | keys, ends=end, **padded)
            for head, model in heads.items()
        ]
    return found


def t5_heads(name: str, reference: str, keys: dict[str, Any]) -> list[Case]:
    """Every head of a family of T5's kin."""
    config = f"{reference}Config"
    return [
        written(name, f"{reference}ForConditionalGeneration", config, T5 | keys),
        Case(f"{name}-base", f"{reference}Model", config, T5 | keys, given="pairs"),
        Case(f"{name}-encoder", f"{reference}EncoderModel", config, T5 | keys),
        Case(f"{name}-sequence", f"{reference}ForSequenceClassification", config, T5 | keys, ends=1),
        Case(f"{name}-token", f"{reference}ForTokenClassification", config, T5 | keys),
        Case(f"{name}-span", f"{reference}ForQuestionAnswering", config, T5 | keys, ends=1),
    ]


GENERATION = "T5ForConditionalGeneration"
UNTIED = {"tie_word_embeddings": False}

CASES: tuple[Case, ...] = (
    *kin("bart", "Bart", {"activation_function": "gelu"}, end=2, judging=True),
    written("bart-scaled", "BartForConditionalGeneration", "BartConfig", BART | {"scale_embedding": True}),
    *kin("mbart", "MBart", {"scale_embedding": True}, end=2, judging=True),
    *kin("m2m_100", "M2M100", {}, end=2, judging=False),
    *kin("pegasus", "Pegasus", {"activation_function": "relu", "scale_embedding": True}, end=1, judging=False),
    *t5_heads("t5", "T5", {}),
    written("t5-v1.1", GENERATION, "T5Config", T5 | UNTIED | {"feed_forward_proj": "gated-gelu"}, untied=True),
    written("t5-ul2", GENERATION, "T5Config", T5 | UNTIED | {"feed_forward_proj": "gated-silu"}),
    *t5_heads("mt5", "MT5", {}),
    written("mt5-untied", f"M{GENERATION}", "MT5Config", T5, untied=True),
    *t5_heads("umt5", "UMT5", {"feed_forward_proj": "gelu"}),
    written("switch_transformers", "SwitchTransformersForConditionalGeneration", "SwitchTransformersConfig", SWITCH),
    Case(
        "switch_transformers-full",
        "SwitchTransformersForConditionalGeneration",
        "SwitchTransformersConfig",
        SWITCH | {"num_sparse_encoder_layers": 4, "num_sparse_decoder_layers": 3, "expert_capacity": 1},
        given="pairs",
    ),
    Case(
        "switch_transformers-base",
        "SwitchTransformersModel",
        "SwitchTransformersConfig",
        SWITCH | {"num_sparse_decoder_layers": 9, "router_bias": True},
        given="pairs",
    ),
    Case("switch_transformers-encoder", "SwitchTransformersEncoderModel", "SwitchTransformersConfig", SWITCH),
)
