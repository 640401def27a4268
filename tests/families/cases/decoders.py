"""Decoders: each family with each of its heads, and what configurations choose; windows shorter than the text, and
rotary positions beyond the length that they were trained for."""

from __future__ import annotations

from typing import Any

from tests.families.cases.case import Case

PAD = 2
GPT2: dict[str, Any] = {
    **{"vocab_size": 50, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 32, "pad_token_id": PAD},
    **{"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "classifier_dropout": 0.0},
}
BLOOM: dict[str, Any] = {"vocab_size": 50, "hidden_size": 24, "n_layer": 2, "n_head": 6, "pad_token_id": PAD}
MPT: dict[str, Any] = {
    **{"vocab_size": 50, "d_model": 24, "n_layers": 2, "n_heads": 6, "max_seq_len": 32, "pad_token_id": PAD},
    "classifier_dropout": 0.0,
}
SIZES: dict[str, Any] = {
    **{"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "pad_token_id": PAD},
    **{"intermediate_size": 24, "max_position_embeddings": 32, "classifier_dropout": 0.0},
}
FALCON: dict[str, Any] = {key: value for key, value in SIZES.items() if key != "intermediate_size"}
GROUPED = SIZES | {"num_key_value_heads": 2}
NEOX = SIZES | {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}}
QWEN3 = GROUPED | {"head_dim": 8}
GEMMA = GROUPED | {"head_dim": 8, "query_pre_attn_scalar": 5, "sliding_window": 3}
MIXTRAL = GROUPED | {"num_local_experts": 5, "num_experts_per_tok": 2}
SPARSE = {"num_experts": 5, "num_experts_per_tok": 3, "moe_intermediate_size": 12}
QWEN2_MOE = GROUPED | SPARSE | {"shared_expert_intermediate_size": 20}
QWEN3_MOE = QWEN3 | SPARSE


def rope(kind: str, **others: Any) -> dict[str, Any]:
    """Return the key for scaled rotary positions."""
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 100.0, "factor": 4.0, **others}}


def family(name: str, model: str, keys: dict[str, Any], **variants: dict[str, Any]) -> list[Case]:
    """Return a family's cases: its language model, every variant of that, and a model with each other head."""
    lm, config = "LMHeadModel" if name == "gpt2" else "ForCausalLM", f"{model}Config"
    changes = {name: {}} | {f"{name}-{kind.replace('_', '-')}": change for kind, change in variants.items()}
    found = [Case(key, f"{model}{lm}", config, keys | change, cached=True) for key, change in changes.items()]
    heads = {"base": "Model", "sequence": "ForSequenceClassification"}
    if name != "olmo2":
        heads["token"] = "ForTokenClassification"
    if name not in ("gemma2", "olmo2"):
        heads["span"] = "ForQuestionAnswering"
    labels = {"id2label": {i: f"L{i}" for i in range(3)}, "label2id": {f"L{i}": i for i in range(3)}}
    for head, suffix in heads.items():
        own = labels if head in ("sequence", "token") else {}
        found.append(Case(f"{name}-{head}", f"{model}{suffix}", config, keys | own, padding=PAD))
    return found


CASES: tuple[Case, ...] = (
    *family(
        "gpt2",
        "GPT2",
        GPT2,
        inner={"n_inner": 20, "activation_function": "relu"},
        untied={"tie_word_embeddings": False},
        scaled={"scale_attn_by_inverse_layer_idx": True, "reorder_and_upcast_attn": True},
        unscaled={"scale_attn_weights": False},
    ),
    *family(
        "gpt_neox",
        "GPTNeoX",
        NEOX,
        sequential={"use_parallel_residual": False},
        tied={"tie_word_embeddings": True},
        unbiased={"attention_bias": False, "hidden_act": "gelu_new"},
        yarn=rope("yarn", original_max_position_embeddings=4, partial_rotary_factor=0.5),
    ),
    *family(
        "bloom",
        "Bloom",
        BLOOM,
        normed={"apply_residual_connection_post_layernorm": True},
        untied={"tie_word_embeddings": False},
    ),
    *family("mpt", "Mpt", MPT, clipped={"attn_config": {"clip_qkv": 0.5, "softmax_scale": 0.7}}),
    *family(
        "falcon",
        "Falcon",
        FALCON,
        new={"new_decoder_architecture": True, "num_kv_heads": 2, "bias": True},
        one_norm={
            "new_decoder_architecture": True,
            "num_kv_heads": 2,
            "num_ln_in_parallel_attn": 1,
            "ffn_hidden_size": 20,
        },
        rw={
            "alibi": True,
            "bias": True,
            "multi_query": False,
            "parallel_attn": False,
            "hidden_size": 24,
            "num_attention_heads": 12,
        },
        many={"multi_query": False, "activation": "relu", "tie_word_embeddings": False},
        linear=rope("linear"),
    ),
    *family(
        "llama",
        "Llama",
        GROUPED,
        biased={"attention_bias": True, "mlp_bias": True},
        tied={"tie_word_embeddings": True},
        wide_heads={"head_dim": 8, "num_key_value_heads": 1, "hidden_act": "gelu"},
        linear=rope("linear"),
        llama3=rope("llama3", low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8),
        yarn=rope("yarn", original_max_position_embeddings=4, beta_fast=2.0, beta_slow=0.5),
        yarn_whole=rope("yarn", original_max_position_embeddings=4, truncate=False, mscale=1.0, mscale_all_dim=0.5),
        yarn_strong=rope("yarn", original_max_position_embeddings=4, attention_factor=0.8),
    ),
    Case(
        "llama-dynamic", "LlamaForCausalLM", "LlamaConfig", GROUPED | rope("dynamic") | {"max_position_embeddings": 4}
    ),
    *family("mistral", "Mistral", GROUPED | {"sliding_window": 3}, whole={"sliding_window": None, "head_dim": 8}),
    *family(
        "qwen2",
        "Qwen2",
        GROUPED,
        tied={"tie_word_embeddings": True},
        windows={"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1},
        types={"layer_types": ["sliding_attention", "full_attention"], "use_sliding_window": True, "sliding_window": 2},
    ),
    *family(
        "qwen3",
        "Qwen3",
        QWEN3,
        biased={"attention_bias": True},
        windows={"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1},
    ),
    *family(
        "gemma2",
        "Gemma2",
        GEMMA,
        biased={"attention_bias": True},
        untied={"tie_word_embeddings": False},
        unbounded={"attn_logit_softcapping": None, "final_logit_softcapping": None},
        types={"layer_types": ["full_attention", "sliding_attention"], "hidden_activation": "gelu"},
    ),
    *family("olmo2", "Olmo2", GROUPED, biased={"attention_bias": True}, alike={"num_key_value_heads": 4}),
    *family(
        "mixtral", "Mixtral", MIXTRAL, windows={"sliding_window": 3, "head_dim": 8}, one={"num_experts_per_tok": 1}
    ),
    *family(
        "qwen2_moe",
        "Qwen2Moe",
        QWEN2_MOE,
        normalised={"norm_topk_prob": True, "qkv_bias": False},
        dense={"mlp_only_layers": [0]},
        steps={"decoder_sparse_step": 2},
        windows={"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 2},
    ),
    *family(
        "qwen3_moe",
        "Qwen3Moe",
        QWEN3_MOE,
        normalised={"norm_topk_prob": True, "attention_bias": True},
        steps={"decoder_sparse_step": 2, "tie_word_embeddings": True},
        windows={"use_sliding_window": True, "sliding_window": 3},
    ),
)
