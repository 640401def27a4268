"""RoBERTa (Liu et al. 2019), XLM-RoBERTa (Conneau et al. 2020) and CamemBERT (Martin et al. 2020): BERT trained for
longer on more. Places are counted from behind the padding token's number, as in fairseq."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from polyformer import parts
from polyformer.families.bert import Bert
from polyformer.families.config import Head
from polyformer.families.encoders import WORDS, Answer, WordNames, first_row, sequence_scores, word_scores


def _architectures(prefix: str) -> dict[str, Head]:
    heads: dict[str, Head] = {
        "Model": "none",
        "ForMaskedLM": "mlm",
        "ForSequenceClassification": "sequence",
        "ForTokenClassification": "token",
        "ForQuestionAnswering": "span",
        "ForCausalLM": "lm",
    }
    return {f"{prefix}{name}": head for name, head in heads.items()}


class Roberta(Bert):
    """The keys of a RoBERTa `config.json`."""

    model_type: ClassVar[str] = "roberta"
    architectures: ClassVar[Mapping[str, Head]] = _architectures("Roberta")
    paper: ClassVar[str] = "Liu et al. 2019"
    tokenizer: ClassVar[str] = "byte-level BPE"
    base: ClassVar[str] = "roberta"
    idle: ClassVar[tuple[str, ...]] = ("roberta.pooler.dense",)
    words: ClassVar[WordNames] = WordNames("lm_head.dense", "lm_head.layer_norm", "lm_head.decoder", "lm_head.bias")

    vocab_size: int = 50265
    pad_token_id: int = 1

    def check(self) -> None:
        super().check()
        room = self.max_position_embeddings - self.pad_token_id - 1
        self.require(
            room > 0, f"{self.max_position_embeddings} places are none behind pad_token_id {self.pad_token_id}"
        )

    def positions(self, width: int) -> parts.Learned:
        offset = self.pad_token_id + 1
        return parts.Learned(width, self.max_position_embeddings - offset, offset)

    def answer(self) -> Answer:
        width = self.hidden_size
        if self.head == "none":
            return first_row(width, "pooler.dense") if self.pooled else Answer()
        if self.head in WORDS:
            widths = (width, width, self.vocab_size)
            return word_scores(widths, "gelu", self.layer_norm_eps, self.words, self.tie_word_embeddings)
        if self.head == "sequence":
            dropouts = (self.head_dropout, self.head_dropout)
            names = ("classifier.dense", "classifier.out_proj")
            return sequence_scores((width, len(self.labels)), "tanh", dropouts, names)
        return self.answer_by_row()


class XlmRoberta(Roberta):
    """The keys of an XLM-RoBERTa `config.json`."""

    model_type: ClassVar[str] = "xlm-roberta"
    architectures: ClassVar[Mapping[str, Head]] = _architectures("XLMRoberta")
    paper: ClassVar[str] = "Conneau et al. 2020"
    tokenizer: ClassVar[str] = "SentencePiece Unigram"

    vocab_size: int = 30522


class Camembert(Roberta):
    """The keys of a CamemBERT `config.json`."""

    model_type: ClassVar[str] = "camembert"
    architectures: ClassVar[Mapping[str, Head]] = _architectures("Camembert")
    paper: ClassVar[str] = "Martin et al. 2020"
    tokenizer: ClassVar[str] = "SentencePiece Unigram"

    vocab_size: int = 30522
