"""The configurations of published decoders, as they came out first, and how many parameters each model has."""

from __future__ import annotations

from typing import Any

ROTATED = {"attention_bias": False, "attention_dropout": 0.0, "hidden_act": "silu", "rope_scaling": None}
PUBLISHED: dict[str, tuple[int, dict[str, Any]]] = {
    "GPT-2": (
        124_439_808,
        {
            **{"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "activation_function": "gelu_new"},
            **{"attn_pdrop": 0.1, "embd_pdrop": 0.1, "resid_pdrop": 0.1, "initializer_range": 0.02, "n_ctx": 1024},
            **{"n_embd": 768, "n_head": 12, "n_layer": 12, "n_positions": 1024, "layer_norm_epsilon": 1e-5},
            **{"summary_activation": None, "summary_first_dropout": 0.1, "summary_proj_to_labels": True},
            **{"summary_type": "cls_index", "summary_use_proj": True, "vocab_size": 50257, "bos_token_id": 50256},
            "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
        },
    ),
    "Pythia 70M": (
        70_426_624,
        {
            **{"model_type": "gpt_neox", "architectures": ["GPTNeoXForCausalLM"], "hidden_act": "gelu"},
            **{"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 6, "num_attention_heads": 8},
            **{"layer_norm_eps": 1e-5, "max_position_embeddings": 2048, "rotary_emb_base": 10000, "rotary_pct": 0.25},
            **{"tie_word_embeddings": False, "torch_dtype": "float16", "use_parallel_residual": True},
            **{"vocab_size": 50304, "bos_token_id": 0, "eos_token_id": 0, "initializer_range": 0.02},
        },
    ),
    "BLOOM 560M": (
        559_214_592,
        {
            **{"model_type": "bloom", "architectures": ["BloomForCausalLM"], "attention_softmax_in_fp32": True},
            **{
                "apply_residual_connection_post_layernorm": False,
                "attention_dropout": 0.0,
                "bias_dropout_fusion": True,
            },
            **{"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3, "unk_token_id": 0, "hidden_dropout": 0.0},
            **{"layer_norm_epsilon": 1e-5, "masked_softmax_fusion": True, "n_embed": 1024, "n_inner": None},
            **{"n_layer": 24, "num_attention_heads": 16, "offset_alibi": 100, "pretraining_tp": 1, "seq_length": 2048},
            **{"skip_bias_add": True, "skip_bias_add_qkv": False, "slow_but_exact": False, "vocab_size": 250880},
        },
    ),
    "Falcon 7B": (
        6_921_720_704,
        {
            **{"model_type": "falcon", "architectures": ["FalconForCausalLM"], "alibi": False, "bias": False},
            **{"apply_residual_connection_post_layernorm": False, "attention_dropout": 0.0, "hidden_dropout": 0.0},
            **{"hidden_size": 4544, "layer_norm_epsilon": 1e-5, "multi_query": True, "num_attention_heads": 71},
            **{"new_decoder_architecture": False, "num_hidden_layers": 32, "parallel_attn": True, "vocab_size": 65024},
        },
    ),
    "Llama 2 7B": (
        6_738_415_616,
        {
            **{"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_act": "silu", "vocab_size": 32000},
            **{"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
            **{"num_key_value_heads": 32, "max_position_embeddings": 4096, "pretraining_tp": 1, "rms_norm_eps": 1e-5},
            **{"rope_scaling": None, "tie_word_embeddings": False, "torch_dtype": "float16", "use_cache": True},
        },
    ),
    "Llama 3.2 1B": (
        1_235_814_400,
        {
            **ROTATED,
            **{"model_type": "llama", "architectures": ["LlamaForCausalLM"], "mlp_bias": False, "vocab_size": 128256},
            **{"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32},
            **{"num_key_value_heads": 8, "head_dim": 64, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5},
            **{"rope_theta": 500000.0, "tie_word_embeddings": True, "eos_token_id": [128001, 128008, 128009]},
            "rope_scaling": {
                **{"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "rope_type": "llama3"},
                "original_max_position_embeddings": 8192,
            },
        },
    ),
    "Mistral 7B": (
        7_241_732_096,
        {
            **{"model_type": "mistral", "architectures": ["MistralForCausalLM"], "hidden_act": "silu"},
            **{"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
            **{"num_key_value_heads": 8, "max_position_embeddings": 32768, "rms_norm_eps": 1e-5, "vocab_size": 32000},
            **{"rope_theta": 10000.0, "sliding_window": 4096, "tie_word_embeddings": False, "torch_dtype": "bfloat16"},
        },
    ),
    "Qwen2 0.5B": (
        494_032_768,
        {
            **{"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "hidden_act": "silu"},
            **{"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14},
            **{"num_key_value_heads": 2, "max_position_embeddings": 131072, "max_window_layers": 24},
            **{"rms_norm_eps": 1e-6, "rope_theta": 1000000.0, "sliding_window": 131072, "use_sliding_window": False},
            **{"tie_word_embeddings": True, "vocab_size": 151936, "bos_token_id": 151643, "eos_token_id": 151643},
        },
    ),
    "Qwen3 0.6B": (
        596_049_920,
        {
            **ROTATED,
            **{"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "head_dim": 128, "hidden_size": 1024},
            **{"intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16, "max_window_layers": 28},
            **{"num_key_value_heads": 8, "max_position_embeddings": 40960, "rms_norm_eps": 1e-6, "rope_theta": 1000000},
            **{"sliding_window": None, "use_sliding_window": False, "tie_word_embeddings": True, "vocab_size": 151936},
        },
    ),
    "Gemma 2 2B": (
        2_614_341_888,
        {
            **{"model_type": "gemma2", "architectures": ["Gemma2ForCausalLM"], "attention_bias": False},
            **{"attn_logit_softcapping": 50.0, "cache_implementation": "hybrid", "final_logit_softcapping": 30.0},
            **{"head_dim": 256, "hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh"},
            **{"hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26, "num_attention_heads": 8},
            **{"num_key_value_heads": 4, "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-6, "rope_theta": 10000.0},
            **{"sliding_window": 4096, "vocab_size": 256000, "max_position_embeddings": 8192, "pad_token_id": 0},
        },
    ),
    "Mixtral 8x7B": (
        46_702_792_704,
        {
            **{"model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "hidden_act": "silu"},
            **{"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
            **{"num_key_value_heads": 8, "num_experts_per_tok": 2, "num_local_experts": 8, "vocab_size": 32000},
            **{"max_position_embeddings": 32768, "output_router_logits": False, "router_aux_loss_coef": 0.02},
            **{"rms_norm_eps": 1e-5, "rope_theta": 1000000.0, "sliding_window": None, "tie_word_embeddings": False},
        },
    ),
    "Qwen1.5-MoE A2.7B": (
        14_315_784_192,
        {
            **{"model_type": "qwen2_moe", "architectures": ["Qwen2MoeForCausalLM"], "hidden_act": "silu"},
            **{"decoder_sparse_step": 1, "hidden_size": 2048, "intermediate_size": 5632, "max_window_layers": 21},
            **{"moe_intermediate_size": 1408, "norm_topk_prob": False, "num_attention_heads": 16, "num_experts": 60},
            **{"num_experts_per_tok": 4, "num_hidden_layers": 24, "num_key_value_heads": 16, "vocab_size": 151936},
            **{"output_router_logits": False, "router_aux_loss_coef": 0.001, "rope_theta": 1000000.0},
            **{"shared_expert_intermediate_size": 5632, "sliding_window": 32768, "use_sliding_window": False},
        },
    ),
    "Qwen3 30B A3B": (
        30_532_122_624,
        {
            **ROTATED,
            **{"model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "decoder_sparse_step": 1},
            **{"head_dim": 128, "hidden_size": 2048, "intermediate_size": 6144, "max_window_layers": 48},
            **{"mlp_only_layers": [], "moe_intermediate_size": 768, "norm_topk_prob": True, "num_attention_heads": 32},
            **{"num_experts": 128, "num_experts_per_tok": 8, "num_hidden_layers": 48, "num_key_value_heads": 4},
            **{"output_router_logits": False, "rope_theta": 1000000.0, "sliding_window": None, "vocab_size": 151936},
        },
    ),
}
