"""ELECTRA (Clark et al. 2020): BERT's blocks, trained to tell which tokens a small generator has replaced."""

from __future__ import annotations

from collections.abc import Container, Mapping
from typing import Any, ClassVar, Self

from polyformer import parts
from polyformer.families import encoders
from polyformer.families.bert import Bert
from polyformer.families.config import Head, activation
from polyformer.families.encoders import WORDS, Answer, WordNames
from polyformer.weights.names import Row


class Electra(Bert):
    """The keys of an ELECTRA `config.json`, of a generator or a discriminator."""

    model_type: ClassVar[str] = "electra"
    architectures: ClassVar[Mapping[str, Head]] = {
        "ElectraModel": "none",
        "ElectraForPreTraining": "discriminator",
        "ElectraForMaskedLM": "mlm",
        "ElectraForSequenceClassification": "sequence",
        "ElectraForTokenClassification": "token",
        "ElectraForQuestionAnswering": "span",
        "ElectraForCausalLM": "lm",
    }
    paper: ClassVar[str] = "Clark et al. 2020"
    tokenizer: ClassVar[str] = "WordPiece"
    unused: ClassVar[Mapping[str, Any]] = {
        "is_encoder_decoder": False,
        "position_embedding_type": "absolute",
        "summary_activation": "gelu",
        "summary_last_dropout": 0.1,
        "summary_type": "first",
        "summary_use_proj": True,
    }
    base: ClassVar[str] = "electra"
    idle: ClassVar[tuple[str, ...]] = ()
    words: ClassVar[WordNames] = WordNames(
        dense="generator_predictions.dense",
        norm="generator_predictions.LayerNorm",
        projection="generator_lm_head",
        bias="generator_lm_head.bias",
    )

    embedding_size: int = 128
    hidden_size: int = 256
    num_attention_heads: int = 4
    intermediate_size: int = 1024

    def seeing(self, names: Container[str]) -> Self:
        return self

    def embed(self) -> parts.Embed:
        narrow = self.embed_in(self.embedding_size)
        if self.embedding_size == self.hidden_size:
            return narrow
        return narrow.replace(project=parts.Linear(self.embedding_size, self.hidden_size))

    def answer(self) -> Answer:
        width, dropout = self.hidden_size, self.head_dropout
        if self.head == "none":
            return Answer()
        if self.head in WORDS:
            widths = (width, self.embedding_size, self.vocab_size)
            return encoders.word_scores(widths, "gelu", self.layer_norm_eps, self.words, self.tie_word_embeddings)
        if self.head == "discriminator":
            dense = (parts.Linear(width, width), parts.Activate(activation(self.hidden_act)))
            head = parts.Chain((*dense, parts.Linear(width, 1), parts.Squeeze()))
            steps = {"head.steps.0": "dense", "head.steps.2": "dense_prediction"}
            return Answer(head, rows=tuple(encoders.module_rows(steps, disk="discriminator_predictions.")))
        if self.head == "sequence":
            names = ("classifier.dense", "classifier.out_proj")
            return encoders.sequence_scores((width, len(self.labels)), "gelu", (dropout, dropout), names)
        return self.answer_by_row()

    def rows(self) -> list[Row]:
        embed = "target" if self.is_decoder else "source"
        return [*super().rows(), *encoders.module_rows({f"{embed}.project": "embeddings_project"})]
