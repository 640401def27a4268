"""DistilBERT (Sanh et al. 2019): BERT at half the depth, without segments and pooler."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from polyformer import parts
from polyformer.families import encoders
from polyformer.families.blocks import drop
from polyformer.families.config import Head, activation
from polyformer.families.encoders import Answer, Encoder, WordNames
from polyformer.weights.names import Row

EPS = 1e-12


class DistilBert(Encoder):
    """The keys of a DistilBERT `config.json`.

    `sinusoidal_pos_embds` says how the table of places began; it is in the file, and trained, either way.
    """

    model_type: ClassVar[str] = "distilbert"
    architectures: ClassVar[Mapping[str, Head]] = {
        "DistilBertModel": "none",
        "DistilBertForMaskedLM": "mlm",
        "DistilBertForSequenceClassification": "sequence",
        "DistilBertForTokenClassification": "token",
        "DistilBertForQuestionAnswering": "span",
    }
    paper: ClassVar[str] = "Sanh et al. 2019"
    tokenizer: ClassVar[str] = "WordPiece"
    aliases: ClassVar[Mapping[str, str]] = {
        "hidden_size": "dim",
        "num_attention_heads": "n_heads",
        "num_hidden_layers": "n_layers",
    }
    unused: ClassVar[Mapping[str, Any]] = {"is_encoder_decoder": False, "output_past": True, "tie_weights_": True}
    base: ClassVar[str] = "distilbert"

    vocab_size: int = 30522
    max_position_embeddings: int = 512
    sinusoidal_pos_embds: bool = False
    n_layers: int = 6
    n_heads: int = 12
    dim: int = 768
    hidden_dim: int = 3072
    dropout: float = 0.1
    attention_dropout: float = 0.1
    activation: str = "gelu"
    qa_dropout: float = 0.1
    seq_classif_dropout: float = 0.2
    pad_token_id: int = 0

    def embed(self) -> parts.Embed:
        return parts.Embed(
            parts.TokenEmbedding(self.vocab_size, self.dim, self.pad_token_id),
            parts.Learned(self.dim, self.max_position_embeddings),
            norm=parts.LayerNorm(self.dim, EPS),
            dropout=drop(self.dropout),
        )

    def blocks(self) -> parts.Stack:
        kernel = parts.Softmax(dropout=self.attention_dropout)
        attention = parts.Attention.of_width(self.dim, self.n_heads, parts.SameDocument()).replace(kernel=kernel)
        feed_forward = parts.FeedForward.of_widths(self.dim, self.hidden_dim, activation(self.activation))
        norm = parts.LayerNorm(self.dim, EPS)
        steps = (
            parts.Residual(attention, after=norm),  # unlike BERT, nothing is dropped behind attention
            parts.Residual(feed_forward, post=drop(self.dropout), after=norm),
        )
        return parts.Stack((parts.Chain(steps),) * self.n_layers)

    def answer(self) -> Answer:
        width, labels = self.dim, len(self.labels)
        if self.head == "mlm":
            names = WordNames("vocab_transform", "vocab_layer_norm", "vocab_projector", "vocab_projector.bias")
            widths = (width, width, self.vocab_size)
            return encoders.word_scores(widths, activation(self.activation), EPS, names, self.tie_word_embeddings)
        if self.head == "sequence":
            dropouts = (0.0, self.seq_classif_dropout)
            return encoders.sequence_scores((width, labels), "relu", dropouts, ("pre_classifier", "classifier"))
        if self.head == "token":
            return encoders.row_scores(width, labels, self.dropout, "classifier")
        return encoders.row_scores(width, 2, self.qa_dropout, "qa_outputs") if self.head == "span" else Answer()

    def rows(self) -> list[Row]:
        embed = {"tokens": "word_embeddings", "positions": "position_embeddings", "norm": "LayerNorm"}
        attention = {f"0.op.{mine}": f"attention.{theirs}_lin" for mine, theirs in LINEAR.items()}
        others = {"0.after": "sa_layer_norm", "1.op.up": "ffn.lin1", "1.op.down": "ffn.lin2"}
        block = {**attention, **others, "1.after": "output_layer_norm"}
        return [
            *encoders.module_rows(embed, "source.", "embeddings."),
            *encoders.module_rows(block, "encoder.blocks.{i}.steps.", "transformer.layer.{i}."),
        ]


LINEAR = {"q": "q", "k": "k", "v": "v", "o": "out"}
