"""BERT and its relatives: each head; blocks shared, embeddings widened, languages, places counted from an offset."""

from __future__ import annotations

from typing import Any

from tests.families.cases.case import Case

BERT: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 20,
    "type_vocab_size": 3,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "num_labels": 3,
}
ELECTRA = BERT | {"embedding_size": 12}
ALBERT = BERT | {"embedding_size": 12, "num_hidden_layers": 3, "classifier_dropout_prob": 0.0}
DISTILBERT: dict[str, Any] = {
    "vocab_size": 50,
    "dim": 16,
    "n_layers": 2,
    "n_heads": 2,
    "hidden_dim": 24,
    "max_position_embeddings": 20,
    **dict.fromkeys(("dropout", "attention_dropout", "qa_dropout", "seq_classif_dropout"), 0.0),
    "num_labels": 3,
}
XLM: dict[str, Any] = {
    "vocab_size": 50,
    "emb_dim": 16,
    "n_layers": 2,
    "n_heads": 2,
    "n_langs": 4,
    "max_position_embeddings": 20,
    **dict.fromkeys(("dropout", "attention_dropout", "summary_first_dropout"), 0.0),
    "num_labels": 3,
}
SPAN = {"num_labels": 2}
DECODER = {"is_decoder": True}
SEGMENTS = {"token_type_ids": 3}
LANGUAGES = {"langs": 4}

Change = tuple[str, str, dict[str, Any]]
BERTS: tuple[Change, ...] = (
    ("bert", "Model", {}),
    ("bert-mlm", "ForMaskedLM", {"hidden_act": "relu"}),
    ("bert-pretraining", "ForPreTraining", {}),
    ("bert-order", "ForNextSentencePrediction", {"num_labels": 2}),
    ("bert-sequence", "ForSequenceClassification", {}),
    ("bert-token", "ForTokenClassification", {}),
    ("bert-span", "ForQuestionAnswering", SPAN),
)
ROBERTAS: tuple[Change, ...] = (
    ("roberta", "Model", {}),
    ("roberta-mlm", "ForMaskedLM", {"hidden_act": "gelu_new"}),
    ("roberta-sequence", "ForSequenceClassification", {}),
    ("roberta-token", "ForTokenClassification", {}),
    ("roberta-span", "ForQuestionAnswering", SPAN),
)
ELECTRAS: tuple[Change, ...] = (
    ("electra", "Model", {}),
    ("electra-mlm", "ForMaskedLM", {"hidden_act": "relu"}),
    ("electra-discriminator", "ForPreTraining", {"hidden_act": "relu"}),
    ("electra-sequence", "ForSequenceClassification", {"embedding_size": 16}),
    ("electra-token", "ForTokenClassification", {}),
    ("electra-span", "ForQuestionAnswering", SPAN),
)
ALBERTS: tuple[Change, ...] = (
    ("albert", "Model", {"num_hidden_groups": 2, "inner_group_num": 2}),
    ("albert-mlm", "ForMaskedLM", {}),
    ("albert-pretraining", "ForPreTraining", {"num_hidden_groups": 3}),
    ("albert-sequence", "ForSequenceClassification", {}),
    ("albert-token", "ForTokenClassification", {"embedding_size": 16}),
    ("albert-span", "ForQuestionAnswering", SPAN),
)
DISTILBERTS: tuple[Change, ...] = (
    ("distilbert", "Model", {"sinusoidal_pos_embds": True}),
    ("distilbert-mlm", "ForMaskedLM", {"activation": "relu"}),
    ("distilbert-sequence", "ForSequenceClassification", {}),
    ("distilbert-token", "ForTokenClassification", {}),
    ("distilbert-span", "ForQuestionAnswering", SPAN),
)
XLMS: tuple[Change, ...] = (
    ("xlm", "Model", {"sinusoidal_embeddings": True}),
    ("xlm-mlm", "WithLMHeadModel", {"gelu_activation": False}),
    ("xlm-sequence", "ForSequenceClassification", {"summary_activation": "tanh"}),
    ("xlm-token", "ForTokenClassification", {}),
    ("xlm-span", "ForQuestionAnsweringSimple", SPAN),
)
LINES: tuple[tuple[str, dict[str, Any], dict[str, int], tuple[Change, ...]], ...] = (
    ("Bert", BERT, SEGMENTS, BERTS),
    ("Roberta", BERT, SEGMENTS, ROBERTAS),
    ("XLMRoberta", BERT, SEGMENTS, (("xlm-roberta", "ForMaskedLM", {"pad_token_id": 0}),)),
    ("Camembert", BERT, SEGMENTS, (("camembert", "ForTokenClassification", {}),)),
    ("Electra", ELECTRA, SEGMENTS, ELECTRAS),
    ("Albert", ALBERT, SEGMENTS, ALBERTS),
    ("DistilBert", DISTILBERT, {}, DISTILBERTS),
    ("XLM", XLM, LANGUAGES, XLMS),
)
ALONE = (
    Case("bert-lm", "BertLMHeadModel", "BertConfig", BERT | DECODER, cached=True),
    Case("roberta-lm", "RobertaForCausalLM", "RobertaConfig", BERT | DECODER, cached=True),
    Case("electra-lm", "ElectraForCausalLM", "ElectraConfig", ELECTRA | DECODER, cached=True),
    Case("xlm-one-language", "XLMModel", "XLMConfig", XLM | {"n_langs": 1}),
)
CASES = (
    *(
        Case(name, f"{line}{model}", f"{line}Config", sizes | changes, extra=extra)
        for line, sizes, extra, variants in LINES
        for name, model, changes in variants
    ),
    *ALONE,
)
