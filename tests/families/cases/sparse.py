"""Longformer with tokens that are global, and BigBird: in full, in blocks, and in full because texts are short."""

from __future__ import annotations

from typing import Any

from tests.families.cases.case import Case
from tests.families.cases.encoders import BERT, DECODER, SEGMENTS, SPAN, Change

LONGFORMER: dict[str, Any] = BERT | {"attention_window": 4, "max_position_embeddings": 40}
BIG_BIRD: dict[str, Any] = BERT | {"block_size": 2, "num_random_blocks": 1, "max_position_embeddings": 40}
FULL = {"attention_type": "original_full"}
GLOBALS = {"global_attention_mask": 2}
LONG = (23, 20, 9)

LONGFORMERS: tuple[Change, ...] = (
    ("longformer", "Model", {}),
    ("longformer-windows", "Model", {"attention_window": [8, 4], "pad_token_id": 0}),
    ("longformer-mlm", "ForMaskedLM", {"hidden_act": "gelu_new"}),
    ("longformer-sequence", "ForSequenceClassification", {}),
    ("longformer-token", "ForTokenClassification", {}),
    ("longformer-span", "ForQuestionAnswering", SPAN),
)
BIG_BIRDS: tuple[Change, ...] = (
    ("big_bird", "Model", {}),
    ("big_bird-rescaled", "Model", {"rescale_embeddings": True, "use_bias": False, "num_attention_heads": 4}),
    ("big_bird-mlm", "ForMaskedLM", {}),
    ("big_bird-pretraining", "ForPreTraining", {}),
    ("big_bird-sequence", "ForSequenceClassification", {"hidden_act": "relu"}),
    ("big_bird-token", "ForTokenClassification", {}),
    ("big_bird-span", "ForQuestionAnswering", SPAN),
)
CASES = (
    *(
        Case(name, f"Longformer{model}", "LongformerConfig", LONGFORMER | keys, extra=SEGMENTS | GLOBALS, lengths=LONG)
        for name, model, keys in LONGFORMERS
    ),
    Case("longformer-short", "LongformerModel", "LongformerConfig", LONGFORMER | {"attention_window": 40}),
    *(
        Case(name, f"BigBird{model}", "BigBirdConfig", BIG_BIRD | keys, extra=SEGMENTS, lengths=LONG)
        for name, model, keys in BIG_BIRDS
    ),
    Case("big_bird-short", "BigBirdForMaskedLM", "BigBirdConfig", BIG_BIRD | {"block_size": 64}, extra=SEGMENTS),
    Case("big_bird-full", "BigBirdModel", "BigBirdConfig", BIG_BIRD | FULL, extra=SEGMENTS, lengths=LONG),
    Case("big_bird-lm", "BigBirdForCausalLM", "BigBirdConfig", BIG_BIRD | FULL | DECODER, cached=True),
)
