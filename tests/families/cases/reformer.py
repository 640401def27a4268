"""Reformers: local layers, hashing ones, both; one way and both ways; chunks of several sizes, rounds and factors.

In training, the reference takes only what its chunks divide and its grid of positions has places for: 12 tokens.
"""

from __future__ import annotations

from typing import Any

from tests.families.cases.case import Case

REFORMER: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 16,
    "num_attention_heads": 2,
    "attention_head_size": 6,
    "feed_forward_size": 24,
    "axial_pos_shape": [3, 4],
    "axial_pos_embds_dim": [6, 10],
    "max_position_embeddings": 12,
    "hash_seed": 5,
    "lsh_attn_chunk_length": 4,
    "local_attn_chunk_length": 4,
    "classifier_dropout": 0.0,
    **dict.fromkeys(("hidden_dropout_prob", "local_attention_probs_dropout_prob"), 0.0),
}
LOCAL, LSH, MIXED = ({"attn_layers": kinds} for kinds in (["local"] * 2, ["lsh"] * 2, ["local", "lsh", "lsh", "local"]))
DECODER = {"is_decoder": True}
UNEQUAL = {"lsh_attn_chunk_length": 3, "local_attn_chunk_length": 2}
ROUNDS = {"num_hashes": 3, "num_buckets": [2, 4], "lsh_num_chunks_after": 1, "local_num_chunks_after": 1}
LABELS = {"id2label": {i: f"L{i}" for i in range(3)}, "label2id": {f"L{i}": i for i in range(3)}}

CHANGES: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("reformer", "ModelWithLMHead", MIXED | DECODER),
    ("reformer-lsh", "ModelWithLMHead", LSH | DECODER | {"num_hashes": 2, "num_buckets": 4}),
    ("reformer-unequal", "ModelWithLMHead", MIXED | DECODER | UNEQUAL | {"chunk_size_feed_forward": 4}),
    ("reformer-far-back", "ModelWithLMHead", MIXED | DECODER | dict.fromkeys(("local_num_chunks_before",), 3)),
    ("reformer-base", "Model", MIXED | ROUNDS),
    ("reformer-base-local", "Model", LOCAL | {"axial_pos_embds": False, "hidden_act": "gelu"}),
    ("reformer-base-lsh", "Model", LSH | {"lsh_num_chunks_before": 0}),
    ("reformer-base-decoder", "Model", MIXED | DECODER | UNEQUAL | {"num_hashes": 2}),
    ("reformer-mlm", "ForMaskedLM", MIXED | UNEQUAL | {"num_hashes": 2}),
    ("reformer-sequence", "ForSequenceClassification", MIXED | LABELS),
    ("reformer-span", "ForQuestionAnswering", MIXED | {"num_buckets": 2}),
)
CASES = (
    Case(
        "reformer-local",
        "ReformerModelWithLMHead",
        "ReformerConfig",
        REFORMER | LOCAL | DECODER,
        lengths=(12, 4, 1),
        cached=True,
    ),
    *(
        Case(name, f"Reformer{model}", "ReformerConfig", REFORMER | keys, lengths=(12, 4, 1))
        for name, model, keys in CHANGES
    ),
)
