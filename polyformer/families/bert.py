"""BERT (Devlin et al. 2019): a post-norm encoder over words, places and segments, with the heads of its tasks."""

from __future__ import annotations

from collections.abc import Container, Mapping
from typing import Any, ClassVar, Self

from polyformer import parts
from polyformer.families import encoders
from polyformer.families.blocks import block, drop
from polyformer.families.config import Head, activation
from polyformer.families.encoders import WORDS, Answer, Encoder, WordNames
from polyformer.spec import Spec
from polyformer.weights.names import Row


class Bert(Encoder):
    """The keys of a BERT `config.json`.

    With `is_decoder` the model is a decoder, whose rows see what stands before them; `add_cross_attention` lets them
    see an encoder's output too, where two models are put together to an encoder–decoder.
    """

    model_type: ClassVar[str] = "bert"
    architectures: ClassVar[Mapping[str, Head]] = {
        "BertModel": "none",
        "BertForMaskedLM": "mlm",
        "BertForPreTraining": "pretraining",
        "BertForNextSentencePrediction": "sequence",
        "BertForSequenceClassification": "sequence",
        "BertForTokenClassification": "token",
        "BertForQuestionAnswering": "span",
        "BertLMHeadModel": "lm",
    }
    paper: ClassVar[str] = "Devlin et al. 2019"
    tokenizer: ClassVar[str] = "WordPiece"
    unused: ClassVar[Mapping[str, Any]] = {
        "directionality": "bidi",
        "eos_token_ids": 0,
        "is_encoder_decoder": False,
        "output_past": True,
        "pooler_fc_size": 768,
        "pooler_num_attention_heads": 12,
        "pooler_num_fc_layers": 3,
        "pooler_size_per_head": 128,
        "pooler_type": "first_token_transform",
        "position_embedding_type": "absolute",
    }
    base: ClassVar[str] = "bert"
    idle: ClassVar[tuple[str, ...]] = ("bert.pooler.dense", "cls.seq_relationship")
    words: ClassVar[WordNames] = WordNames(
        dense="cls.predictions.transform.dense",
        norm="cls.predictions.transform.LayerNorm",
        projection="cls.predictions.decoder",
        bias="cls.predictions.bias",
    )

    projections: ClassVar[Mapping[str, str]] = {
        "q": "self.query",
        "k": "self.key",
        "v": "self.value",
        "o": "output.dense",
    }
    embedding_norm: ClassVar[str] = "norm"

    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12
    classifier_dropout: float | None = None
    is_decoder: bool = False
    add_cross_attention: bool = False
    pad_token_id: int = 0

    def check(self) -> None:
        super().check()
        self.require(self.is_decoder or not self.add_cross_attention, "add_cross_attention needs is_decoder")

    def seeing(self, names: Container[str]) -> Self:
        return self.replace(pooled="pooler.dense.weight" in names)

    def spec(self) -> parts.Transformer:
        made = super().spec()
        if not self.is_decoder:
            return made
        ties = tuple(parts.Tie(one.tied, one.to.replace("source", "target")) for one in made.ties)
        return made.replace(source=None, encoder=None, target=made.source, decoder=made.encoder, ties=ties)

    def embed(self) -> parts.Embed:
        return self.embed_in(self.hidden_size)

    def embed_in(self, width: int) -> parts.Embed:
        """Return the embedding of words, places and segments in rows of this width."""
        return parts.Embed(
            parts.TokenEmbedding(self.vocab_size, width, self.pad_token_id),
            self.positions(width),
            others=(parts.Lookup("token_type_ids", self.type_vocab_size, width),),
            norm=parts.LayerNorm(width, self.layer_norm_eps),
            dropout=drop(self.hidden_dropout_prob),
        )

    def positions(self, width: int) -> parts.Learned:
        """Return the table of places."""
        return parts.Learned(width, self.max_position_embeddings)

    def blocks(self) -> parts.Stack:
        width, heads = self.hidden_size, self.num_attention_heads
        kernel = parts.Softmax(dropout=self.attention_probs_dropout_prob)
        crossing = parts.CrossAttention.of_width(width, heads).replace(kernel=kernel)
        feed_forward = parts.FeedForward.of_widths(width, self.intermediate_size, activation(self.hidden_act))
        others = (*(crossing,) * self.add_cross_attention, feed_forward)
        norm, dropout = parts.LayerNorm(width, self.layer_norm_eps), self.hidden_dropout_prob
        attentions = [self.attention(layer) for layer in range(self.num_hidden_layers)]
        return parts.Stack(tuple(block(one, *others, norm=norm, dropout=dropout) for one in attentions))

    def attention(self, layer: int) -> Spec:
        """Return the self-attention of a layer."""
        see = parts.Causal() & parts.SameDocument() if self.is_decoder else parts.SameDocument()
        kernel = parts.Softmax(dropout=self.attention_probs_dropout_prob)
        return parts.Attention.of_width(self.hidden_size, self.num_attention_heads, see).replace(kernel=kernel)

    def answer(self) -> Answer:
        width, labels, pooler = self.hidden_size, len(self.labels), f"{self.prefix}pooler.dense"
        if self.head == "none":
            return encoders.first_row(width, pooler) if self.pooled else Answer()
        if self.head in WORDS:
            widths, act = (width, width, self.vocab_size), activation(self.hidden_act)
            words = encoders.word_scores(widths, act, self.layer_norm_eps, self.words, self.tie_word_embeddings)
            order = encoders.order_scores(width, 2, 0.0, (pooler, "cls.seq_relationship"))
            return words.beside(order) if self.head == "pretraining" else words
        if self.architecture == "BertForNextSentencePrediction":
            return encoders.sequence_scores((width, 2), "tanh", (0.0, 0.0), (pooler, "cls.seq_relationship"))
        if self.head == "sequence":
            return encoders.sequence_scores((width, labels), "tanh", (0.0, self.head_dropout), (pooler, "classifier"))
        return self.answer_by_row()

    def answer_by_row(self) -> Answer:
        """Return the head for tokens or for the ends of an answer."""
        if self.head == "span":
            return encoders.row_scores(self.hidden_size, 2, 0.0, "qa_outputs")
        return encoders.row_scores(self.hidden_size, len(self.labels), self.head_dropout, "classifier")

    @property
    def head_dropout(self) -> float:
        """Dropout before a classifier."""
        return self.hidden_dropout_prob if self.classifier_dropout is None else self.classifier_dropout

    def rows(self) -> list[Row]:
        embed, stack = ("target", "decoder") if self.is_decoder else ("source", "encoder")
        tables = {"tokens": "word_embeddings", "positions": "position_embeddings", "others.0": "token_type_embeddings"}
        attentions = ("attention", "crossattention")[: 1 + self.add_cross_attention]
        last = len(attentions)
        modules = {f"{last}.op.up": "intermediate.dense", f"{last}.op.down": "output.dense"}
        for step, name in enumerate(attentions):
            modules |= {f"{step}.op.{mine}": f"{name}.{theirs}" for mine, theirs in self.projections.items()}
        norms = {f"{step}.after": f"{name}.output.LayerNorm" for step, name in enumerate(attentions)}
        place = (f"{stack}.blocks.{{i}}.steps.", "encoder.layer.{i}.")
        return [
            *encoders.module_rows(tables, f"{embed}.", "embeddings."),
            *encoders.norm_rows({self.embedding_norm: "LayerNorm"}, f"{embed}.", "embeddings."),
            *encoders.module_rows(modules, *place),
            *encoders.norm_rows({**norms, f"{last}.after": "output.LayerNorm"}, *place),
        ]
