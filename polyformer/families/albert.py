"""ALBERT (Lan et al. 2020): BERT with narrow embeddings that are widened, and blocks shared across layers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Mapping
from typing import Any, ClassVar, Self

from polyformer import parts
from polyformer.families import encoders
from polyformer.families.blocks import drop
from polyformer.families.config import Head, activation
from polyformer.families.encoders import WORDS, Answer, Encoder, WordNames
from polyformer.weights.names import Row


class Albert(Encoder):
    """The keys of an ALBERT `config.json`.

    The layers are cut into `num_hidden_groups` runs, each of which walks one group of `inner_group_num` blocks again
    and again.
    """

    model_type: ClassVar[str] = "albert"
    architectures: ClassVar[Mapping[str, Head]] = {
        "AlbertModel": "none",
        "AlbertForMaskedLM": "mlm",
        "AlbertForPreTraining": "pretraining",
        "AlbertForSequenceClassification": "sequence",
        "AlbertForTokenClassification": "token",
        "AlbertForQuestionAnswering": "span",
    }
    paper: ClassVar[str] = "Lan et al. 2020"
    tokenizer: ClassVar[str] = "SentencePiece Unigram"
    unused: ClassVar[Mapping[str, Any]] = {
        "down_scale_factor": 1,
        "eos_token_ids": 0,
        "gap_size": 0,
        "is_encoder_decoder": False,
        "layers_to_keep": [],
        "net_structure_type": 0,
        "num_memory_blocks": 0,
        "output_past": True,
        "position_embedding_type": "absolute",
    }
    base: ClassVar[str] = "albert"
    idle: ClassVar[tuple[str, ...]] = ("albert.pooler", "sop_classifier.classifier")

    vocab_size: int = 30000
    embedding_size: int = 128
    hidden_size: int = 4096
    num_hidden_layers: int = 12
    num_hidden_groups: int = 1
    num_attention_heads: int = 64
    intermediate_size: int = 16384
    inner_group_num: int = 1
    hidden_act: str = "gelu_new"
    hidden_dropout_prob: float = 0.0
    attention_probs_dropout_prob: float = 0.0
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12
    classifier_dropout_prob: float = 0.1
    pad_token_id: int = 0

    def check(self) -> None:
        super().check()
        few = 1 <= self.num_hidden_groups <= self.num_hidden_layers
        self.require(few, f"{self.num_hidden_layers} layers can't be cut into {self.num_hidden_groups} groups")
        self.require(1 <= self.inner_group_num <= 64, f"inner_group_num = {self.inner_group_num} is not within 1 … 64")

    def seeing(self, names: Container[str]) -> Self:
        return self.replace(pooled="pooler.weight" in names)

    def embed(self) -> parts.Embed:
        width = self.embedding_size
        return parts.Embed(
            parts.TokenEmbedding(self.vocab_size, width, self.pad_token_id),
            parts.Learned(width, self.max_position_embeddings),
            others=(parts.Lookup("token_type_ids", self.type_vocab_size, width),),
            norm=parts.LayerNorm(width, self.layer_norm_eps),
            dropout=drop(self.hidden_dropout_prob),
            project=parts.Linear(width, self.hidden_size),
        )

    def blocks(self) -> parts.Stack:
        layers, groups = self.num_hidden_layers, self.num_hidden_groups
        # the reference's formula in its floating-point numbers, for counts that leave a remainder
        times = Counter(int(layer / (layers / groups)) for layer in range(layers))
        group = parts.Chain((self._block(),) * self.inner_group_num)
        return parts.Stack(tuple(parts.Repeat(group, times[one]) for one in range(groups)))

    def _block(self) -> parts.Chain:
        width, kernel = self.hidden_size, parts.Softmax(dropout=self.attention_probs_dropout_prob)
        attention = parts.Attention.of_width(width, self.num_attention_heads, parts.SameDocument())
        feed_forward = parts.FeedForward.of_widths(width, self.intermediate_size, activation(self.hidden_act))
        norm = parts.LayerNorm(width, self.layer_norm_eps)
        first = parts.Residual(attention.replace(kernel=kernel), post=drop(self.hidden_dropout_prob), after=norm)
        return parts.Chain((first, parts.Residual(feed_forward, after=norm)))

    def answer(self) -> Answer:
        width, labels, dropout = self.hidden_size, len(self.labels), self.classifier_dropout_prob
        pooler = f"{self.prefix}pooler"
        if self.head == "none":
            return encoders.first_row(width, pooler) if self.pooled else Answer()
        if self.head in WORDS:
            widths, act = (width, self.embedding_size, self.vocab_size), activation(self.hidden_act)
            names = WordNames("predictions.dense", "predictions.LayerNorm", "predictions.decoder", "predictions.bias")
            words = encoders.word_scores(widths, act, self.layer_norm_eps, names, self.tie_word_embeddings)
            order = encoders.order_scores(width, labels, dropout, (pooler, "sop_classifier.classifier"))
            return words.beside(order) if self.head == "pretraining" else words
        if self.head == "sequence":
            return encoders.sequence_scores((width, labels), "tanh", (0.0, dropout), (pooler, "classifier"))
        if self.head == "span":
            return encoders.row_scores(width, 2, 0.0, "qa_outputs")
        return encoders.row_scores(width, labels, dropout, "classifier")

    def rows(self) -> list[Row]:
        tables = {"tokens": "word_embeddings", "positions": "position_embeddings", "others.0": "token_type_embeddings"}
        embed = {**tables, "norm": "LayerNorm"}
        projections = {"q": "query", "k": "key", "v": "value", "o": "dense"}
        attention = {f"0.op.{mine}": f"attention.{theirs}" for mine, theirs in projections.items()}
        others = {"0.after": "attention.LayerNorm", "1.op.up": "ffn", "1.op.down": "ffn_output"}
        block = {**attention, **others, "1.after": "full_layer_layer_norm"}
        group = "encoder.albert_layer_groups.{i}.albert_layers.{j}."
        return [
            *encoders.module_rows(embed, "source.", "embeddings."),
            *encoders.module_rows({"source.project": "encoder.embedding_hidden_mapping_in"}),
            *encoders.module_rows(block, "encoder.blocks.{i}.block.steps.{j}.steps.", group),
        ]
